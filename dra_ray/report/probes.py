"""One page on what a teacher's features can teach: probes and dimensions over noise level and
layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dra_ray.report import html, plots, words
from dra_ray.report.words import in_percent
from dra_ray.storage import Store

COLUMNS = {
    "layer": "layer",
    "width": "width",
    "sigma": "sigma",
    "accuracy": "accuracy (%)",
    "centred_dimension": "effective dimension, centred",
    "dimension": "effective dimension",
    "within_cosine": "mean cosine within a class",
    "between_cosine": "mean cosine between classes",
    "uniformity": "uniformity",
    "constant_loss": "loss of the best constant",
    "class_constant_loss": "loss of the best constant per class",
    "leak": "random labels found (%)",
}


def write(
    page: Store, teacher: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """One self-contained .html file with the rows of `diagnosis.probe_teacher` as plots and a
    table; `facts` say how they were measured.
    """
    columns = [column for column in COLUMNS if any(column in row for row in rows)]
    shown = [[_cell(column, row.get(column)) for column in columns] for row in rows]
    probes = html.plot(
        figure(rows), "Accuracy over σ", "A line per layer; click on a name to hide it."
    )
    dimensions = html.plot(
        figure(rows, "centred_dimension", "effective dimension"),
        "Effective dimension over σ",
        "Of the centred features: with few dimensions, alignment has little to teach.",
    )
    body = [
        html.section("plot", "Linear probe accuracy by noise level", "", probes),
        html.section("dimensions", "Effective dimension by noise level", "", dimensions),
        html.section(
            "table",
            "Every layer and noise level",
            "",
            html.Table([COLUMNS[column] for column in columns], shown, sortable=True),
        ),
        html.Section("how", "How it was measured", words.fields(facts), []),
    ]
    page.write_text(html.page(teacher, "What a teacher can teach", headline(rows), body))


def headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """The best probe, beside that of raw pixels."""
    probed = [row for row in rows if "accuracy" in row]
    if not probed:
        return "Too few images of each class for a probe"
    best = max(probed, key=lambda row: row["accuracy"])
    name = f"Best: {best['layer']} at sigma = {best['sigma']:g}, {in_percent(best['accuracy'])} %"
    pixels = in_percent(best.get("pixels_accuracy"))
    return name if pixels is None else f"{name}; raw pixels {pixels} %"


def _cell(column: str, value: Any) -> Any:
    if column in ("accuracy", "leak"):
        return in_percent(value)
    return round(value, 3) if isinstance(value, float) and column != "sigma" else value


def figure(
    rows: Sequence[Mapping[str, Any]],
    column: str = "accuracy",
    title: str = "linear probe accuracy (%)",
) -> plots.Figure:
    """A column over noise level, on a logarithmic axis; a line per layer, and one of raw pixels'
    accuracy.
    """
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    traces = [_trace(number, layer, rows, column) for number, layer in enumerate(layers)]
    pixels = next((row["pixels_accuracy"] for row in rows if "pixels_accuracy" in row), None)
    if column == "accuracy" and pixels is not None:
        traces.append(_floor(sorted({row["sigma"] for row in rows}), in_percent(pixels)))
    axis = {"title": "noise level σ", "type": "log"}
    return {"data": traces, "layout": plots.frame(axis, {"title": title})}


def _trace(
    number: int, layer: str, rows: Sequence[Mapping[str, Any]], column: str
) -> dict[str, Any]:
    own = sorted(
        (row["sigma"], row[column]) for row in rows if row["layer"] == layer and column in row
    )
    values = [in_percent(y) if column == "accuracy" else round(y, 3) for _, y in own]
    drawn = plots.line(number, layer, [sigma for sigma, _ in own], values, "lines+markers")
    shown = f"{escape(layer)}, σ = %{{x:.3g}}: %{{y:.1f}}<extra></extra>"
    return drawn | {"hovertemplate": shown}


def _floor(sigmas: Sequence[float], accuracy: float | None) -> dict[str, Any]:
    return {
        "x": list(sigmas),
        "y": [accuracy] * len(sigmas),
        "mode": "lines",
        "name": "raw pixels",
        "line": {"color": plots.GREY, "dash": "longdash", "width": 1.5},
        "hovertemplate": "raw pixels: %{y:.1f}<extra></extra>",
    }
