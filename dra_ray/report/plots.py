"""The report's figures as plain plotly dictionaries; a figure whose data are missing is None, never
empty.

Colours are Okabe and Ito's (safe for the colour-blind); every group also has its own symbol or
dash. Text and grid colours are set in the page, which knows whether it is shown light or dark.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dra_ray.config import catalogue
from dra_ray.config.readers import is_read
from dra_ray.evaluation import intervals
from dra_ray.pool.records import LogRow
from dra_ray.report import words
from dra_ray.report.collect import LABELS, outcome
from dra_ray.report.summary import Finals, Summary, Trial
from dra_ray.report.words import in_percent
from dra_ray.runs import Record, RungRow, TeacherRow, ValidationRow
from dra_ray.sweeps import equal

Figure = dict[str, Any]
Rungs = Sequence[RungRow]
Curves = Mapping[str, Sequence[ValidationRow]]  # by role

BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#9aa0a8"
COLOURS = {"dra": BLUE, "baseline": VERMILLION, "run": BLUE}
HATCH = {"shape": "/", "fillmode": "overlay", "fgcolor": "#fff", "fgopacity": 0.5, "solidity": 0.25}
# A trial's group: label, colour, symbol, opacity; stopped trials fade.
GROUPS = {
    "dra": ("DRA finalist", BLUE, "circle", 1.0),
    "baseline": ("Baseline finalist", VERMILLION, "diamond", 1.0),
    "done": ("trained to the end", GREEN, "square", 0.9),
    "unfinished": ("unfinished", PURPLE, "triangle-up", 0.9),
    "failed": ("failed", PURPLE, "cross", 0.9),
    "stopped": ("stopped early", GREY, "x", 0.7),
}
MOST_VALUES = 12  # of an axis, up to which each has a place of its own; drawn values are a curve
APART = 60  # trials up to which each is a line of its own
AXES = {
    "align.weight": "λ, weight of the alignment (align.weight)",
    "align.sigma": "σ, noise at which the teacher looks (align.sigma)",
    "synthetic.images": "synthetic images used (synthetic.images)",
}


def swept(summary: Summary) -> list[str]:
    """The fields that the sweep changed, those with a name of their own first."""
    fields = {field for trial in summary.sweep for field in trial.fields}
    return [field for field in AXES if field in fields] + sorted(fields - set(AXES))


def trade_off(summary: Summary) -> Figure | None:
    """Clean against robust validation accuracy, one point per trial."""
    return _by_group(
        summary, lambda trial: in_percent(trial.clean_accuracy), {"title": "clean accuracy (%)"}
    )


def against(summary: Summary, field: str, history: Rungs) -> Figure | None:
    """Robust validation accuracy over one swept field, of trials after the same epoch and against
    the same attack.

    `history` are the rows of rungs.jsonl. None where no two values can be compared
    (`dra_ray.sweeps.equal`).
    """
    found = effects(summary, field, history)
    if not found:
        return None
    trials = {trial.trial: trial for trial in summary.sweep}
    seen = {name for effect in found for name in effect.robust_accuracy}
    values = sorted(
        {trials[name].fields[field] for name in seen},
        key=lambda value: (isinstance(value, str), value),
    )
    if len(values) > MOST_VALUES:
        return None
    order = [words.value(value) for value in values]
    axis = {
        "title": AXES.get(field, html.escape(field)),
        "type": "category",
        "categoryorder": "array",
        "categoryarray": order,
    }
    lines, points = [], []
    for effect, dash in zip(found, itertools.cycle(("dot", "dash", "dashdot", "solid"))):
        task = f", {html.escape(words.fields(effect.task))}" if len(found) > 1 else ""
        then = [_at(trials[name], effect) for name in effect.robust_accuracy]
        line = _best_of_each(then, field, order) | {"name": f"best of each value{task}"}
        lines.append(line | {"line": {"color": GREY, "width": 1.5, "dash": dash}})
        points += then
    figure = _by_group(
        summary.model_copy(update={"sweep": points}),
        lambda trial: words.value(trial.fields[field]),
        axis,
    )
    assert figure is not None
    return figure | {"data": lines + figure["data"]}


def _at(trial: Trial, effect: equal.Effect) -> Trial:
    """A trial as it was after the epoch at which an effect compares."""
    robust = effect.robust_accuracy[trial.trial]
    then = {"robust_accuracy": robust, "epoch": effect.epoch, "clean_accuracy": None}
    return trial.model_copy(update=then)


def _best_of_each(trials: Sequence[Trial], field: str, order: Sequence[str]) -> Figure:
    """The highest robust accuracy at each value of the field, in their order."""
    best: dict[str, float] = {}
    for trial in trials:
        value = words.value(trial.fields[field])
        best[value] = max(trial.robust_accuracy or 0.0, best.get(value, 0.0))
    xs = [value for value in order if value in best]
    ys = [in_percent(best[x]) for x in xs]
    return {"x": xs, "y": ys, "mode": "lines", "hoverinfo": "skip"}


def effects(summary: Summary, field: str, history: Rungs) -> list[equal.Effect]:
    """What `against` shows of a field."""
    trials = {trial.trial: trial.fields for trial in summary.sweep if is_read(field, trial.fields)}
    return equal.effects(field, trials, equal.scores(history))


def rungs(summary: Summary, history: Rungs) -> Figure | None:
    """Robust validation accuracy over epochs per trial, as successive halving saw it."""
    reports: dict[str, list[RungRow]] = {}
    for row in history:
        reports.setdefault(row.trial, []).append(row)
    traces, named = [], set()
    groups = _groups(summary)
    for trial in sorted(
        _scored(summary), key=lambda trial: list(GROUPS).index(groups[trial.trial]), reverse=True
    ):  # finalists on top
        label, colour, symbol, opacity = GROUPS[groups[trial.trial]]
        shown = reports[trial.trial]
        traces.append(
            {
                "x": [row.epoch for row in shown],
                "y": [in_percent(row.robust_accuracy) for row in shown],
                "mode": "lines+markers",
                "name": label,
                "legendgroup": label,
                "showlegend": label not in named,
                "opacity": opacity,
                "line": {"color": colour, "width": 2.5 if "finalist" in label else 1.5},
                "marker": {
                    "size": [4] * (len(shown) - 1) + [10],
                    "symbol": symbol,
                    "opacity": 1,
                    "line": {"width": 0},
                },
                "hovertemplate": f"{_hover(trial)}<br>epoch %{{x}}: robust %{{y:.1f}} "
                "%<extra></extra>",
            }
        )
        named.add(label)
    if not traces:
        return None
    layout = frame(_epochs(traces), {"title": "robust accuracy (%)"})
    if len(traces) > APART:
        traces = _merged(traces)
    levels = summary.asha.rungs if summary.asha else []
    layout["shapes"] = [_line_at(epoch) for epoch in levels]
    layout["annotations"] = [
        {
            "x": epoch,
            "y": 1,
            "yref": "paper",
            "yanchor": "bottom",
            "text": f"rung {i}",
            "showarrow": False,
        }
        for i, epoch in enumerate(levels, start=1)
    ]
    layout["margin"] = layout["margin"] | {"t": 52}  # the toolbar lies above the rungs' names
    return {
        "data": traces,
        "layout": layout | {"legend": layout["legend"] | {"traceorder": "reversed"}},
    }


def _merged(lines: Sequence[Figure]) -> list[Figure]:
    """One trace for each group of lines, with a gap after each: hundreds of traces are slow to
    draw, and nobody reads their hover texts.
    """
    groups: dict[str, list[Figure]] = {}
    for line in lines:
        groups.setdefault(line["name"], []).append(line)
    return [
        {
            "x": [x for line in of_group for x in (*line["x"], None)],
            "y": [y for line in of_group for y in (*line["y"], None)],
            "mode": "lines",
            "name": name,
            "opacity": of_group[0]["opacity"],
            "line": of_group[0]["line"] | {"width": 1},
            "hoverinfo": "skip",
        }
        for name, of_group in groups.items()
    ]


def pool(history: Sequence[LogRow], time: str = "time since the pool started") -> Figure | None:
    """Teacher replicas over time: running, wanted, and the work that asked for them. `time` names
    the axis, which begins with the history.
    """
    if not history:
        return None
    seconds = history[-1].at - history[0].at
    counts = [count or 0 for row in history for count in (row.running, row.target, row.demand)]
    highest = max(1, *filter(math.isfinite, counts))
    unit, name = (
        (3600, "hours")
        if seconds > 10_800
        else (60, "minutes")
        if seconds > 300
        else (1, "seconds")
    )
    x = [round((row.at - history[0].at) / unit, 3) for row in history]
    series = [
        (
            "demand",
            "demand: replicas' worth of work",
            {"color": GREY, "width": 1.2},
            {"fill": "tozeroy", "fillcolor": "rgba(154,160,168,.22)"},
        ),
        (
            "target",
            "replicas wanted",
            {"color": VERMILLION, "width": 1.8, "dash": "dash", "shape": "hv"},
            {},
        ),
        ("running", "replicas running", {"color": BLUE, "width": 2.8, "shape": "hv"}, {}),
    ]
    traces = [
        {
            "x": x,
            "y": [getattr(row, key) for row in history],
            "mode": "lines",
            "name": label,
            "line": line,
        }
        | more
        for key, label, line, more in series
        if any(getattr(row, key) is not None for row in history)
    ]
    layout = frame(
        {"title": f"{time} ({name})"},
        {"title": "replicas", "range": [0, 1.1 * highest], "dtick": max(1, round(highest / 6))},
    )
    return {"data": traces, "layout": layout | {"hovermode": "x unified"}}


def training(curves: Curves) -> Figure | None:
    """Validation accuracy over epochs; solid: under attack, dashed: clean."""
    traces = []
    for role, rows in curves.items():
        for key, dash, what in (
            ("robust_accuracy", "solid", "robust"),
            ("clean_accuracy", "dash", "clean"),
        ):
            traces += _curve(
                rows,
                key,
                _named(role, what),
                {"color": COLOURS[role], "dash": dash, "width": 2},
                scale=100,
            )
    return (
        {"data": traces, "layout": frame(_epochs(traces), {"title": "accuracy (%)"})}
        if traces
        else None
    )


def losses(curves: Curves) -> Figure | None:
    """The terms of the training loss over epochs."""
    terms = (
        ("loss_clean", "solid", "clean"),
        ("loss_robust", "dash", "robust"),
        ("loss_align", "dot", "alignment"),
    )
    traces = []
    for role, rows in curves.items():
        for key, dash, what in terms:
            if any(_number(row, key) for row in rows):  # the baseline has no alignment term
                traces += _curve(
                    rows,
                    key,
                    _named(role, what),
                    {"color": COLOURS[role], "dash": dash, "width": 2},
                )
    return (
        {"data": traces, "layout": frame(_epochs(traces), {"title": "loss (no unit)"})}
        if traces
        else None
    )


def teacher(rows: Sequence[TeacherRow]) -> Figure | None:
    """A teacher's training loss over the images that it has seen."""
    losses = [_number(row, "loss") for row in rows]
    if all(loss is None for loss in losses):
        return None
    trace = {
        "x": [row.images_seen for row in rows],
        "y": losses,
        "mode": "lines" if len(rows) > 1 else "markers",
        "name": "loss",
        "line": {"color": BLUE, "width": 2},
    }
    return {
        "data": [trace],
        "layout": frame(
            {"title": "images seen", "rangemode": "tozero"}, {"title": "loss (no unit)"}
        ),
    }


def attacks(finals: Finals) -> Figure | None:
    """Test accuracy after each attack of AutoAttack, with Wilson's 95 % intervals."""
    traces = []
    for role, final in finals.items():
        scores = {"clean": final.clean_accuracy} | final.after_attack
        traces.append(
            {
                "type": "bar",
                "name": LABELS[role],
                "x": [
                    f"{'+ ' * (place > 1)}{_attack_label(attack)}"
                    for place, attack in enumerate(scores)
                ],
                "y": [in_percent(score) for score in scores.values()],
                "marker": {"color": COLOURS[role], "pattern": HATCH if role == "baseline" else {}},
                "error_y": whiskers(
                    list(scores.values()),
                    [_wilson(score, final.images) for score in scores.values()],
                ),
                "hovertemplate": f"{LABELS[role]}, %{{x}}: %{{y:.1f}} %<extra></extra>",
            }
        )
    layout = frame(
        {"title": "attacks so far"}, {"title": "test images still right (%)", "range": [0, 100]}
    )
    return (
        {"data": traces, "layout": layout | {"barmode": "group", "bargap": 0.3}} if traces else None
    )


def _attack_label(attack: str) -> str:
    return "no attack" if attack == catalogue.CLEAN.name else catalogue.label(attack)


def curve(finals: Finals) -> Figure | None:
    """Test accuracy under PGD over the radius, and AutoAttack's at its own, with 95 % intervals."""
    traces = []
    for role, final in finals.items():
        rows = sorted(final.curve, key=lambda row: row.eps_255)
        if not rows:
            continue
        scores = [row.accuracy for row in rows]
        edges = [row.interval or _wilson(row.accuracy, final.images) for row in rows]
        traces.append(
            _points(
                _named(role, "PGD"),
                [row.eps_255 for row in rows],
                scores,
                edges,
                colour=COLOURS[role],
            )
            | {"mode": "lines+markers"}
        )
        radius = final.threat.eps_255
        if radius is not None:
            name = _named(role, "AutoAttack")
            traces.append(
                _points(
                    name,
                    [radius],
                    [final.autoattack_accuracy],
                    [final.interval],
                    colour=COLOURS[role],
                    symbol="diamond-open",
                    size=12,
                )
            )
    axis = {"title": "radius ε of the attack (1/255 of full brightness)", "rangemode": "tozero"}
    return (
        {
            "data": traces,
            "layout": frame(axis, {"title": "test images still right (%)", "range": [0, 100]}),
        }
        if traces
        else None
    )


# -- shared pieces ---------------------------------------------------------------------------------
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, GREY)  # colours of any number of lines, in turn
DASHES = ("solid", "dash", "dot", "dashdot")  # then their dashes


def line(number: int, name: str, x: Sequence[float], y: Sequence[Any], mode: str) -> Figure:
    """Line `number` of several, from 0; its name is shown where the pointer is, before the
    values.
    """
    return {
        "x": list(x),
        "y": list(y),
        "mode": mode,
        "name": html.escape(name),
        "line": {
            "color": SERIES[number % len(SERIES)],
            "dash": DASHES[number // len(SERIES) % len(DASHES)],
            "width": 2,
        },
    }


def frame(x: Figure, y: Figure) -> Figure:
    """The layout of a figure: both axes with their titles ({"title": text, ...}), room for them,
    and the legend below.
    """

    def axis(settings: Figure) -> Figure:
        return settings | {
            "title": {"text": settings["title"], "standoff": 12},
            "automargin": True,
            "zeroline": False,
        }

    # The legend hangs below the axis title, from the bottom of the picture, so it can cover
    # neither.
    legend = {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 0,
        "yref": "container",
        "yanchor": "bottom",
    }
    return {
        "xaxis": axis(x),
        "yaxis": axis(y),
        "legend": legend,
        "margin": {"l": 60, "r": 16, "t": 34, "b": 60},
    }


def _named(role: str, what: str) -> str:
    """A curve's name; on the page of one run it needs no owner."""
    return what if role == "run" else f"{LABELS[role]}, {what}"


def _points(
    name: str,
    x: list[float],
    scores: list[float],
    edges: list[Any],
    *,
    colour: str,
    symbol: str = "circle",
    size: int = 8,
) -> Figure:
    return {
        "x": x,
        "y": [in_percent(score) for score in scores],
        "mode": "markers",
        "name": name,
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "symbol": symbol, "size": size},
        "error_y": whiskers(scores, edges),
        "hovertemplate": f"{name}, ε = %{{x:g}}/255: %{{y:.1f}} %<extra></extra>",
    }


def _wilson(score: float, images: int) -> tuple[float, float]:
    return intervals.wilson(round(score * images), images)


def whiskers(scores: Sequence[float], edges: Sequence[Sequence[float]]) -> Figure:
    """From (low, high) in 0..1, in percent."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [
            round(100 * (high - score), 2) for (_, high), score in zip(edges, scores, strict=True)
        ],
        "arrayminus": [
            round(100 * (score - low), 2) for (low, _), score in zip(edges, scores, strict=True)
        ],
        "thickness": 1.4,
    }


def _scored(summary: Summary) -> list[Trial]:
    return [trial for trial in summary.sweep if trial.robust_accuracy is not None]


def _groups(summary: Summary) -> dict[str, str]:
    decisions = {trial.trial: trial.decision for trial in summary.sweep}
    groups = {
        trial: decision if decision in GROUPS else "unfinished"
        for trial, decision in decisions.items()
    }
    return groups | {final.trial: role for role, final in summary.finals.items()}


def _by_group(summary: Summary, x: Callable[[Trial], Any], axis: Figure) -> Figure | None:
    groups, traces = _groups(summary), []
    for group, (label, colour, symbol, opacity) in GROUPS.items():
        trials = [trial for trial in _scored(summary) if groups[trial.trial] == group]
        if trials:
            traces.append(
                {
                    "x": [x(trial) for trial in trials],
                    "y": [in_percent(trial.robust_accuracy) for trial in trials],
                    "mode": "markers",
                    "name": label,
                    "marker": {"color": colour, "symbol": symbol, "size": 12, "opacity": opacity},
                    "hovertemplate": [f"{_hover(trial)}<extra></extra>" for trial in trials],
                }
            )
    return (
        {"data": traces, "layout": frame(axis, {"title": "robust accuracy (%)"})}
        if traces
        else None
    )


def _hover(trial: Trial) -> str:
    """Escaped: plotly reads hover texts as HTML, and `%{` as a template."""
    fields = [f"{field} = {words.value(value)}" for field, value in trial.fields.items()]
    clean = "" if trial.clean_accuracy is None else f"clean {in_percent(trial.clean_accuracy)} %, "
    scores = f"{clean}robust {in_percent(trial.robust_accuracy)} % after epoch {trial.epoch}"
    return "<br>".join(
        html.escape(line).replace("%{", "% {")
        for line in [trial.trial, *fields, scores, outcome(trial)]
    )


def _number(row: Record, key: str) -> float | None:
    """A field of a row; None, which leaves a gap in a curve, where it is not a number."""
    value: float = getattr(row, key)
    return None if math.isnan(value) else value


def _curve(
    rows: Sequence[ValidationRow], key: str, name: str, line: Figure, scale: float = 1
) -> list[Figure]:
    values = [_number(row, key) for row in rows]
    points = [
        (row.epoch, None if value is None else round(scale * value, 4))
        for row, value in zip(rows, values, strict=True)
    ]
    if all(y is None for _, y in points):
        return []
    mode = "lines" if len(points) > 1 else "markers"
    return [
        {
            "x": [x for x, _ in points],
            "y": [y for _, y in points],
            "mode": mode,
            "name": name,
            "line": line,
        }
    ]


def _epochs(traces: list[Figure]) -> Figure:
    """An axis of whole epochs."""
    last = max((x for trace in traces for x in trace["x"]), default=1)
    return {"title": "epoch", "rangemode": "tozero"} | ({"dtick": 1} if last <= 12 else {})


def _line_at(epoch: int) -> Figure:
    place = {"x0": epoch, "x1": epoch, "y0": 0, "y1": 1, "yref": "paper", "layer": "below"}
    return {"type": "line", "line": {"color": GREY, "width": 1, "dash": "dot"}} | place
