"""The page of `dra analyse`: for each analysis what the paper saw, what is seen here, a plot and a
table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dra_ray.inspection.analyses import Analysis
from dra_ray.inspection.frozen import EPS_255
from dra_ray.report import html, plots, words
from dra_ray.report.words import in_percent
from dra_ray.storage import Store

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x", "cross")


def write(page: Store, title: str, facts: Mapping[str, Any], found: Sequence[Analysis]) -> None:
    """One self-contained .html file; `facts` say how the models were looked at."""
    sections: list[html.Section | None] = [_section(each) for each in found]
    how = html.Section("how", "How it was measured", words.fields(facts), [])
    page.write_text(html.page(title, "What the paper looked at", found[0].here, [*sections, how]))


def _section(found: Analysis) -> html.Section | None:
    drawn = [html.plot(figure, title, text) for figure, title, text in FIGURES[found.name](found)]
    lead = f"The paper: {found.paper} Here: {found.here}"
    return html.section(found.name, found.title, lead, html.grid(*drawn), table(found.rows))


def table(rows: Sequence[Mapping[str, Any]]) -> html.Table:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    heads = [column.replace("_", " ") for column in columns]
    cells = [[_cell(column, row.get(column)) for column in columns] for row in rows]
    return html.Table(heads, cells, sortable=True)


def _cell(column: str, value: Any) -> Any:
    if column.endswith("accuracy") or column.startswith("eps_"):
        return in_percent(value)
    return round(value, 3) if isinstance(value, float) else value


# -- figures ---------------------------------------------------------------------------------------
Drawn = list[tuple[plots.Figure | None, str, str]]


def _geometry(found: Analysis) -> Drawn:
    """The paper's plane: higher is better on both axes, so both are drawn with their sign
    changed.
    """
    rows = [row for row in found.rows if "alignment" in row]
    figure = _scatter(rows, "uniformity", "alignment", "− uniformity", "− alignment", -1)
    text = "Up: adversarial images stay near; right: features are spread evenly."
    return [(figure, "Alignment over uniformity", text)]


def _similarity(found: Analysis) -> Drawn:
    rows = [row for row in found.rows if "robust_accuracy" in row]
    figure = _scatter(rows, "cknna", "robust_accuracy", "CKNNA", "robust accuracy (%)", 1)
    return [(figure, "Robust accuracy over similarity", "A point per model.")]


def _scatter(
    rows: Sequence[Mapping[str, Any]], x: str, y: str, x_title: str, y_title: str, sign: int
) -> plots.Figure | None:
    if not rows:
        return None
    scale = 100 if y.endswith("accuracy") else 1
    traces = [
        {
            "x": [round(sign * row[x], 4)],
            "y": [round(sign * scale * row[y], 3)],
            "mode": "markers",
            "name": escape(row["model"]),
            "marker": {
                "color": plots.SERIES[number % len(plots.SERIES)],
                "symbol": SYMBOLS[number % len(SYMBOLS)],
                "size": 12,
            },
            "hovertemplate": f"{escape(row['model'])}: %{{x:.3f}}, %{{y:.2f}}<extra></extra>",
        }
        for number, row in enumerate(rows)
    ]
    return {"data": traces, "layout": plots.frame({"title": x_title}, {"title": y_title})}


def _dimension(found: Analysis) -> Drawn:
    return [
        (
            _lines(found, kind, "directions kept", "accuracy (%)", 1, 100),
            f"{title} accuracy by directions",
            "The features are projected on their main directions before the last layer.",
        )
        for kind, title in (("clean", "Clean"), ("robust", "Robust"))
    ]


def _sae(found: Analysis) -> Drawn:
    figure = _lines(found, "error", "latents an image may use (k)", "error", 0, 1)
    for trace, curves in zip(figure["data"], found.curves.values(), strict=True):
        trace |= {"x": [int(k) for k in curves["k"]], "mode": "lines+markers"}
        trace["error_y"] = {"type": "data", "array": curves["deviation"]}
    text = (
        "As a share of the features' variance, on images not learnt from; bars: deviation of seeds."
    )
    return [(figure, "Error by sparsity", text)]


MAPS = 4  # models whose difference maps are drawn


def _frequency(found: Analysis) -> Drawn:
    kinds = {"perturbation": "Adversarial perturbations", "gradient": "Input gradients"}
    drawn: Drawn = [
        (
            _lines(found, kind, "cycles per image", "mean power", 0, 1),
            title,
            "Of maps of unit length: white noise is flat.",
        )
        for kind, title in kinds.items()
    ]
    first, *others = found.curves
    for model in others[:MAPS]:
        for kind, title in kinds.items():
            text = f"Red where {model} has more power than {first}, blue where it has less."
            figure = _map(found.curves[model][f"{kind}_over_first"])
            drawn.append((figure, f"{title} of {model} over {first}", text))
    return drawn


def _map(ratio: Sequence[float]) -> plots.Figure:
    """Of log2 ratios at the frequencies of a square image, zero in the middle."""
    side = math.isqrt(len(ratio))
    around = list(range(-(side // 2), side - side // 2))
    rows = [[round(x, 3) for x in ratio[at : at + side]] for at in range(0, len(ratio), side)]
    widest = max(0.1, *(abs(x) for row in rows for x in row))
    trace = {
        "type": "heatmap",
        "x": around,
        "y": around,
        "z": rows,
        "zmin": -widest,
        "zmax": widest,
        "colorscale": "RdBu",  # of plotly: from blue to red
        "hovertemplate": "%{x}, %{y}: %{z:.2f}<extra></extra>",
        "colorbar": {"title": {"text": "log2 ratio"}},
    }
    axes = [{"title": f"cycles per image, {way}"} for way in ("across", "down")]
    layout = plots.frame(*axes)
    layout["yaxis"] |= {"scaleanchor": "x", "autorange": "reversed"}
    return {"data": [trace], "layout": layout}


def _probe(found: Analysis) -> Drawn:
    figure = _lines(found, "accuracy", "eps (1/255)", "accuracy (%)", 0, 100)
    for trace in figure["data"]:
        trace["x"] = list(EPS_255)
    text = "PGD on the first test images; EOT averages each gradient over so many draws of noise."
    return [(figure, "Accuracy by radius", text)]


def _in_a_table_alone(found: Analysis) -> Drawn:
    return []


def _lines(
    found: Analysis, kind: str, x_title: str, y_title: str, first: int, scale: float
) -> plots.Figure:
    traces = []
    for number, (model, curves) in enumerate(found.curves.items()):
        values = [round(scale * value, 4) for value in curves[kind]]
        drawn = plots.line(number, model, range(first, first + len(values)), values, "lines")
        shown = f"{escape(model)}: %{{x}}, %{{y:.3g}}<extra></extra>"
        traces.append(drawn | {"hovertemplate": shown})
    return {"data": traces, "layout": plots.frame({"title": x_title}, {"title": y_title})}


FIGURES = {
    "geometry": _geometry,
    "similarity": _similarity,
    "dimension": _dimension,
    "sae": _sae,
    "frequency": _frequency,
    "probe": _probe,
    "heads": _in_a_table_alone,
}
