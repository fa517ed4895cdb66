"""One page on a teacher's probes: accuracy over noise level and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from dra_ray.inspection.probe import Probed
from dra_ray.report import html, plots, words
from dra_ray.report.words import in_percent
from dra_ray.storage import Store

COLOURS = (plots.BLUE, plots.VERMILLION, plots.GREEN, plots.PURPLE, plots.GREY)
DASHES = ("solid", "dash", "dot", "dashdot")


def write(page: Store, teacher: str, facts: Mapping[str, object], rows: Sequence[Probed]) -> None:
    """One self-contained .html file with the rows as a plot and a table.

    `facts` say how they were made.
    """
    best = max(rows, key=lambda row: row.accuracy)
    shown = [[row.layer, row.width, row.sigma, in_percent(row.accuracy)] for row in rows]
    body = [
        html.section(
            "plot",
            "Linear probe accuracy by noise level",
            "",
            html.plot(
                figure(rows), "Accuracy over σ", "A line per layer; click on a name to hide it."
            ),
        ),
        html.section(
            "table",
            "Every probe",
            "",
            html.Table(["layer", "width", "sigma", "accuracy (%)"], shown, sortable=True),
        ),
        html.Section("how", "How it was measured", words.fields(facts), []),
    ]
    headline = f"Best: {best.layer} at sigma = {best.sigma:g}, {in_percent(best.accuracy)} %"
    page.write_text(html.page(teacher, "Teacher probes", headline, body))


def figure(rows: Sequence[Probed]) -> plots.Figure:
    """Accuracy over noise level, on a logarithmic axis; a line per layer."""
    traces = []
    for number, layer in enumerate(dict.fromkeys(row.layer for row in rows)):
        own = sorted((row.sigma, row.accuracy) for row in rows if row.layer == layer)
        traces.append(
            {
                "x": [sigma for sigma, _ in own],
                "y": [in_percent(accuracy) for _, accuracy in own],
                "mode": "lines+markers",
                "name": escape(layer),
                "line": {
                    "color": COLOURS[number % len(COLOURS)],
                    "dash": DASHES[number // len(COLOURS) % len(DASHES)],
                    "width": 2,
                },
                "hovertemplate": f"{escape(layer)}, σ = %{{x:.3g}}: %{{y:.1f}} %<extra></extra>",
            }
        )
    return {
        "data": traces,
        "layout": plots.frame(
            {"title": "noise level σ", "type": "log"}, {"title": "linear probe accuracy (%)"}
        ),
    }
