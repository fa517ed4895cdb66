"""Figures of what a sweep found, as plain plotly dictionaries; None where there is nothing to
show.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from dra_ray.report import words
from dra_ray.report.plots import (
    AXES,
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    VERMILLION,
    Figure,
    frame,
    whiskers,
)
from dra_ray.report.summary import Trial
from dra_ray.report.words import in_percent
from dra_ray.sweeps.effects import Curve, Level
from dra_ray.sweeps.equal import Refused
from dra_ray.sweeps.fits import Fit, Guess
from dra_ray.sweeps.importance import Importance
from dra_ray.sweeps.pareto import Front

SEQUENCE = ("#cfd6de", "#9fc3dd", "#5aa2cf", "#0072B2", "#D55E00")  # low to high fifths of trials


def importance(found: Importance | Refused) -> Figure | None:
    """A bar per axis; hollow where its weight is no more than chance gives."""
    if isinstance(found, Refused):
        return None
    axes = found.axes[::-1]  # plotly draws the first at the bottom
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [in_percent(axis.share) for axis in axes],
        "y": [html.escape(axis.field) for axis in axes],
        "marker": {"color": [BLUE if axis.stands_out else GREY for axis in axes]},
        "error_x": whiskers([axis.share for axis in axes], [axis.interval for axis in axes]),
        "hovertemplate": [
            f"{html.escape(axis.field)}: {in_percent(axis.share)} %, p = {axis.p_value:.2g}"
            "<extra></extra>"
            for axis in axes
        ],
    }
    layout = frame({"title": "share of the importance (%)", "rangemode": "tozero"}, {"title": ""})
    layout["yaxis"]["title"]["text"] = "axis"
    return {"data": [bars], "layout": layout | {"showlegend": False}}


def effect(curve: Curve) -> Figure:
    """Robust and clean accuracy over the levels of one axis, with 95 % intervals."""
    x = [_label(level) for level in curve.levels]
    robust = _series(
        "robust",
        x,
        [level.robust_accuracy for level in curve.levels],
        [level.robust_interval for level in curve.levels],
        {"color": BLUE, "width": 2},
    )
    traces = [robust]
    clean = [level for level in curve.levels if level.clean_accuracy is not None]
    if clean:
        traces.append(
            _series(
                "clean",
                [_label(level) for level in clean],
                [level.clean_accuracy or 0.0 for level in clean],
                [level.clean_interval or (0.0, 0.0) for level in clean],
                {"color": GREEN, "width": 1.5, "dash": "dash"},
            )
        )
    axis = {
        "title": AXES.get(curve.field, html.escape(curve.field)),
        "type": "category",
        "categoryorder": "array",
        "categoryarray": x,
    }
    return {"data": traces, "layout": frame(axis, {"title": "accuracy (%)"})}


def _label(level: Level) -> str:
    if level.low == level.high:
        return html.escape(words.value(level.low))
    return f"{level.low:.3g} to {level.high:.3g}"  # only numbers make a range


def _series(
    name: str, x: Sequence[Any], scores: Sequence[float], edges: Sequence[Any], line: Figure
) -> Figure:
    return {
        "x": list(x),
        "y": [in_percent(score) for score in scores],
        "mode": "lines+markers",
        "name": name,
        "line": line,
        "marker": {"size": 8},
        "error_y": whiskers(scores, edges),
        "hovertemplate": f"{name}, %{{x}}: %{{y:.1f}} %<extra></extra>",
    }


def pareto(found: Front | Refused) -> Figure | None:
    """Clean against robust accuracy of the finished trials; the front as a line of steps."""
    if isinstance(found, Refused):
        return None
    groups = {
        "on the front": (
            [p for p in found.places if p.front == 1],
            BLUE,
            "circle",
            "lines+markers",
        ),
        "beaten in both": ([p for p in found.places if p.front > 1], GREY, "x", "markers"),
    }
    traces = [
        {
            "x": [in_percent(place.clean_accuracy) for place in places],
            "y": [in_percent(place.robust_accuracy) for place in places],
            "mode": mode,
            "name": name,
            "line": {"color": colour, "width": 1.5, "shape": "vh", "dash": "dot"},
            "marker": {"color": colour, "symbol": symbol, "size": 10},
            "hovertemplate": [
                f"{html.escape(p.trial)}: clean {in_percent(p.clean_accuracy)} %, robust "
                f"{in_percent(p.robust_accuracy)} %<br>on the front in "
                f"{in_percent(p.share_on_front)} % of resamples<extra></extra>"
                for p in places
            ],
        }
        for name, (places, colour, symbol, mode) in groups.items()
        if places
    ]
    layout = frame({"title": "clean accuracy (%)"}, {"title": "robust accuracy (%)"})
    return {"data": traces, "layout": layout}


def fit(found: Fit) -> Figure:
    """The measured points, the law through them, and its extrapolation with its interval."""
    colour = BLUE if found.what == "robust" else GREEN
    points = _series(
        "measured",
        [point.x for point in found.points],
        [point.accuracy for point in found.points],
        [
            (point.accuracy - 1.96 * point.error, point.accuracy + 1.96 * point.error)
            for point in found.points
        ],
        {"color": colour},
    ) | {"mode": "markers"}
    line = found.line
    far = [line[-1], *found.beyond]
    traces = [
        _band("95 % interval", [*line, *found.beyond], colour),
        _law("power law", line, {"color": colour, "width": 2}),
        _law("extrapolated", far, {"color": VERMILLION, "width": 2, "dash": "dash"}),
        points,
    ]
    title = AXES.get(found.of, found.of.replace("_", " "))
    axis = {"title": title, "type": "log"}
    return {"data": traces, "layout": frame(axis, {"title": f"{found.what} accuracy (%)"})}


def _law(name: str, guesses: Sequence[Guess], line: Figure) -> Figure:
    return {
        "x": [guess.x for guess in guesses],
        "y": [in_percent(guess.accuracy) for guess in guesses],
        "mode": "lines",
        "name": name,
        "line": line,
    }


def _band(name: str, guesses: Sequence[Guess], colour: str) -> Figure:
    up = [(guess.x, guess.interval[1]) for guess in guesses]
    down = [(guess.x, guess.interval[0]) for guess in reversed(guesses)]
    return {
        "x": [x for x, _ in up + down],
        "y": [in_percent(edge) for _, edge in up + down],
        "mode": "lines",
        "fill": "toself",
        "opacity": 0.25,
        "name": name,
        "line": {"color": colour, "width": 0},
        "hoverinfo": "skip",
    }


def parallel(trials: Sequence[Trial], fields: Sequence[str]) -> Figure | None:
    """Every trial as a line over the axes, from each axis' lowest value to its highest, coloured
    by its place in robust accuracy; the last axis is that accuracy.
    """
    scored = [trial for trial in trials if trial.robust_accuracy is not None]
    if len(scored) < 2 or not fields:
        return None
    heights = {field: _heights([trial.fields.get(field) for trial in scored]) for field in fields}
    heights["robust %"] = _heights([in_percent(trial.robust_accuracy) for trial in scored])
    order = sorted(range(len(scored)), key=lambda k: scored[k].robust_accuracy or 0.0)
    names = ("lowest fifth", "second fifth", "middle fifth", "fourth fifth", "highest fifth")
    traces = []
    for fifth, (name, colour) in enumerate(zip(names, SEQUENCE, strict=True)):
        members = order[fifth * len(order) // 5 : (fifth + 1) * len(order) // 5]
        if not members:
            continue
        x: list[str | None] = []
        y: list[float | None] = []
        for k in members:
            x += [*(html.escape(field) for field in heights), None]
            y += [*(places[k] for places in heights.values()), None]
        traces.append(
            {
                "x": x,
                "y": y,
                "mode": "lines+markers",
                "name": f"{name} of robust accuracy",
                "line": {"color": colour, "width": 1.2},
                "marker": {"size": 4},
                "opacity": 0.8,
                "hoverinfo": "skip",
                "connectgaps": False,
            }
        )
    layout = frame(
        {"title": "axis", "type": "category"},
        {"title": "low to high", "range": [-0.12, 1.12], "showticklabels": False},
    )
    layout["annotations"] = [
        {
            "x": html.escape(field),
            "y": at,
            "yshift": shift,
            "text": html.escape(_end(field, scored, at)),
            "showarrow": False,
        }
        for field in heights
        for at, shift in ((0, -14), (1, 14))
    ]
    return {"data": traces, "layout": layout}


def _heights(values: Sequence[Any]) -> list[float | None]:
    """Each value's place between the lowest (0) and the highest (1); names by their order. None
    where a trial lacks the field.
    """
    known = [value for value in values if value is not None]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in known):
        low, high = min(known, default=0), max(known, default=0)
        return [
            None if v is None else round((v - low) / (high - low), 4) if high > low else 0.5
            for v in values
        ]
    names = sorted({str(value) for value in known})
    steps = max(1, len(names) - 1)
    return [None if v is None else round(names.index(str(v)) / steps, 4) for v in values]


def _end(field: str, trials: Sequence[Trial], at: int) -> str:
    """What the lower or upper end of an axis stands for."""
    values: list[Any]
    if field == "robust %":
        values = [in_percent(trial.robust_accuracy) for trial in trials]
    else:
        values = [trial.fields.get(field) for trial in trials]
    known = [value for value in values if value is not None]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in known):
        known = [str(value) for value in known]
    return words.value((max if at else min)(known)) if known else ""


def courses(sweeps: Mapping[str, Sequence[tuple[float, float]]]) -> Figure | None:
    """Of several sweeps: the best robust accuracy so far over the images spent."""
    colours = (BLUE, VERMILLION, GREEN, PURPLE, GREY)
    traces = [
        {
            "x": [spent for spent, _ in course],
            "y": [in_percent(best) for _, best in course],
            "mode": "lines+markers",
            "name": html.escape(name),
            "line": {"color": colours[k % len(colours)], "width": 2, "shape": "hv"},
            "marker": {"size": 4},
        }
        for k, (name, course) in enumerate(sweeps.items())
        if course
    ]
    layout = frame(
        {"title": "images spent by all trials", "rangemode": "tozero"},
        {"title": "best robust accuracy so far (%)"},
    )
    return {"data": traces, "layout": layout} if traces else None
