"""Pieces of a self-contained HTML page: no network, plotly inline once, pictures as data URIs,
every given text escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from dra_ray.report import plots


def page(
    title: str, kind: str, headline: str, sections: Iterable[str], description: str = ""
) -> str:
    """A whole page of the `sections` (HTML) that are not empty; plotly is in it only if one of them
    holds a plot.
    """
    body = "\n".join(section for section in sections if section)
    return _PAGE.format(
        title=escape(title),
        kind=escape(kind),
        headline=escape(headline),
        description=f"<p class=lead>{escape(description)}</p>" if description else "",
        body=body,
        style=_STYLE,
        plotly=get_plotlyjs() if _PLOT in body else "",
        script=_SCRIPT,
    )


# -- blocks: each returns HTML, "" where there is nothing to show ----------------------------------
def section(name: str, title: str, lead: str, *parts: str) -> str:
    """A headed part of the page; `lead` is its first paragraph as text, `parts` are HTML."""
    intro = f"<p>{escape(lead)}</p>" if lead else ""
    return f"<section id={name}><h2>{escape(title)}</h2>{intro}{''.join(parts)}</section>"


def caption(text: str) -> str:
    return f"<p class=caption>{escape(text)}</p>" if text else ""


def bullets(items: Iterable[str]) -> str:
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def grid(*parts: str) -> str:
    """Blocks side by side where there is room."""
    body = "".join(parts)
    return f'<div class="grid">{body}</div>' if body else ""


_PLOT = "<div class=plot "


def plot(figure: plots.Figure | None, title: str, text: str = "") -> str:
    """A figure (plotly as plain data, with both axes in its layout) with its title and a caption."""
    if not figure:
        return ""
    data = json.dumps(figure, sort_keys=True, cls=PlotlyJSONEncoder).replace("<", "\\u003c")
    legend = f"<figcaption>{escape(text)}</figcaption>" if text else ""
    return (
        f'<figure><h3>{escape(title)}</h3>{_PLOT}role=img aria-label="{escape(title)}"></div>'
        f"<script type='application/json'>{data}</script>{legend}</figure>"
    )


def picture(png: bytes, name: str, text: str) -> str:
    """A PNG file inside the page; `name` is what a screen reader says."""
    return f"<figure>{_image(png, name)}<figcaption>{escape(text)}</figcaption></figure>"


def pictures(title: str, cells: Sequence[tuple[bytes, str]]) -> str:
    """PNG files of equal size side by side, each with its label below; stays within its column
    however narrow.
    """
    shown = "".join(
        f"<figure>{_image(png, f'{title}: {label}')}<figcaption>{escape(label)}</figcaption></figure>"
        for png, label in cells
    )
    return f"<div class=example><h3>{escape(title)}</h3><div class=triple>{shown}</div></div>"


def _image(png: bytes, name: str) -> str:
    return (
        f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    )


def cards(facts: Iterable[tuple[str, str, str]]) -> str:
    """Large values, each with what it is and a note."""
    body = "".join(
        f"<div class=card><div class=what>{escape(what)}</div><div "
        f"class=value>{escape(value)}</div><div class=note>{escape(note)}</div></div>"
        for what, value, note in facts
    )
    return f"<div class=cards>{body}</div>" if body else ""


def table(head: Sequence[str], body: Iterable[Iterable[Any]], sortable: bool = False) -> str:
    """Rows of plain values; numbers stand to the right, None is a dash, and the table scrolls by
    itself where it is too wide.
    """
    columns = "".join(f"<th>{escape(str(name))}</th>" for name in head)
    lines = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in body)
    return f"<div class=scroll><table{' class=sortable' if sortable else ''}><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>"


def _cell(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = f"{value:.1f}" if isinstance(value, float) and value >= 10 else _plain(value)
        return f'<td class=number data-value="{value!r}">{text}</td>'
    text = "–" if value is None else escape(str(value))
    return f"<td class=long>{text}</td>" if len(text) > 40 else f"<td>{text}</td>"


def _plain(value: float) -> str:
    return count(value) if isinstance(value, int) else f"{value:g}"


def shares(head: Sequence[str], rows: Iterable[tuple[str, Sequence[float | None]]]) -> str:
    """A table of fractions in 0..1 as percent, each cell tinted by its value; `head` names the
    columns, of which the first holds names.
    """
    columns = "".join(
        f"<th{' class=number' if place else ''}>{escape(name)}</th>"
        for place, name in enumerate(head)
    )
    lines = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(_share(value) for value in values)}</tr>"
        for name, values in rows
    )
    return f"<div class=scroll><table class=shares><thead><tr>{columns}</tr></thead><tbody>{lines}</tbody></table></div>"


def _share(value: float | None) -> str:
    if value is None:
        return "<td class=number>–</td>"
    return f'<td class=number style="background:rgba(0,114,178,{0.5 * value:.3f})">{100 * value:.1f}</td>'


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
    """(name, seconds, note) as a bar each, the longest as wide as there is room."""
    longest = max((seconds for _, seconds, _ in rows), default=0) or 1
    noted = any(note for _, _, note in rows)
    lines = "".join(
        f"<tr><td>{escape(name)}</td><td class=number>{duration(seconds)}</td>"
        + (f"<td class=number>{escape(note)}</td>" if noted else "")
        + f'<td class=share><div style="width:{100 * seconds / longest:.1f}%"></div></td></tr>'
        for name, seconds, note in rows
    )
    return f"<div class=scroll><table><tbody>{lines}</tbody></table></div>" if rows else ""


# -- values in words -------------------------------------------------------------------------------
def word(value: Any) -> str | None:
    """A value beside its name: as text, so that it is not set apart to the right."""
    return (
        None
        if value is None
        else count(value)
        if isinstance(value, int) and not isinstance(value, bool)
        else plots.show(value)
    )


def fields(changed: Mapping[str, Any]) -> str:
    return ", ".join(f"{field} = {plots.show(value)}" for field, value in changed.items()) or "–"


def count(value: float | None) -> str:
    return "?" if value is None else f"{value:,}".replace(",", "\u202f")


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f}\u00a0%"


def span(interval: Iterable[float], sign: str = "") -> str:
    return " to ".join(f"{100 * edge:{sign}.1f}" for edge in interval).replace("-", "−")


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


_STYLE = """
:root {
  --ink:#1c2229; --soft:#5b6673; --line:#dfe3e8; --paper:#fff; --tint:#f5f7f9; --mark:#0072B2; --warn:#fff6e5; --grid:#e6e9ed;
  color-scheme:light
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink:#e6e9ed; --soft:#a3adb8; --line:#343b44; --paper:#14181d; --tint:#1d232a; --mark:#56B4E9; --warn:#33290f; --grid:#2c333b;
    color-scheme:dark
  }
}
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink) }
body { font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif }
main { max-width:1120px; margin:0 auto; padding:40px 24px 80px }
header .kind { color:var(--soft); font-size:.85rem; letter-spacing:.06em; text-transform:uppercase }
h1 { font-size:2rem; line-height:1.2; margin:.1em 0 .5em; overflow-wrap:anywhere }
.headline { font-size:1.25rem; line-height:1.5; max-width:62ch; margin:0 0 .6em }
.headline, .lead, li, h3 { overflow-wrap:anywhere }
.lead, section > p { max-width:75ch; color:var(--soft); overflow-wrap:anywhere }
section { margin-top:52px }
h2 { font-size:1.35rem; margin:0 0 .6em; padding-bottom:.3em; border-bottom:1px solid var(--line) }
h3 { font-size:1rem; margin:1.4em 0 .3em }
.cards { display:grid; grid-template-columns:repeat(auto-fill,minmax(235px,1fr)); gap:14px }
.card { background:var(--tint); border:1px solid var(--line); border-radius:10px; padding:14px 16px }
.card .what, .card .note { color:var(--soft); font-size:.85rem; line-height:1.4 }
.card .value { font-size:1.6rem; font-weight:650; line-height:1.35; font-variant-numeric:tabular-nums }
.notice { background:var(--warn); border-radius:10px; padding:16px 20px }
.notice h2 { border:0; padding:0 } .notice p { margin:0 } .notice ul { margin:.4em 0 0 }
.examples { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr)); gap:8px 28px; margin:.6em 0 1em }
.example { min-width:0 } .triple { display:grid; grid-template-columns:repeat(3,minmax(0,1fr)); gap:8px }
.triple figcaption { font-size:.8rem; line-height:1.35; overflow-wrap:anywhere }
.grid { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,470px),1fr)); gap:12px 32px }
figure { margin:0; min-width:0 }
figcaption, .caption { color:var(--soft); font-size:.9rem; max-width:75ch; margin-top:.3em }
.plot { height:400px; width:100% }
img { width:100%; max-width:480px; image-rendering:pixelated; border:1px solid var(--line); border-radius:6px }
.scroll { overflow-x:auto; margin:.6em 0 1em }
table { border-collapse:collapse; font-size:.9rem; min-width:100% }
th, td { text-align:left; padding:7px 11px; border-bottom:1px solid var(--line); vertical-align:top }
th { color:var(--soft); font-weight:600; background:var(--tint) }
td, th { white-space:nowrap } td.long { white-space:normal; overflow-wrap:anywhere; min-width:16em }
td.number { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
.shares { width:auto; min-width:min(100%,640px) } th.number { text-align:right }
.sortable th { cursor:pointer; user-select:none }
.sortable th[aria-sort=ascending]::after { content:" ▲" } .sortable th[aria-sort=descending]::after { content:" ▼" }
.share { width:60% } .share div { background:var(--mark); height:12px; border-radius:3px; margin-top:6px; min-width:2px }
dl { display:grid; grid-template-columns:minmax(120px,max-content) 1fr; gap:6px 20px; margin:0 }
dt { font-weight:600 } dd { margin:0; color:var(--soft) }
summary { cursor:pointer; color:var(--mark) }
@media (max-width:600px) { main { padding:24px 14px } dl { grid-template-columns:1fr } dd { margin-bottom:.5em } }
@media print { .plot { break-inside:avoid } }
"""

_SCRIPT = """
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function draw() {
  for (const box of document.querySelectorAll(".plot")) {
    const figure = JSON.parse(box.nextElementSibling.textContent), layout = figure.layout;
    Object.assign(layout, {paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: css("--ink")},
      hoverlabel: {align: "left", bgcolor: css("--paper"), bordercolor: css("--line"), font: {color: css("--ink")}}});
    for (const axis of [layout.xaxis, layout.yaxis]) Object.assign(axis, {gridcolor: css("--grid"), linecolor: css("--line"), showline: true});
    for (const trace of figure.data) if (trace.error_y) trace.error_y.color = css("--ink");
    layout.modebar = {bgcolor: "rgba(0,0,0,0)", color: css("--soft"), activecolor: css("--ink")};
    // Named buttons only, and no server: plotly's own set has one that uploads the figure.
    Plotly.react(box, figure.data, layout, {responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], toImageButtonOptions: {format: "svg"}});
  }
}
function sort(head) {
  const table = head.closest("table"), column = head.cellIndex, up = head.getAttribute("aria-sort") !== "ascending";
  const key = row => { const cell = row.cells[column]; return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value); };
  const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  const rows = [...table.tBodies[0].rows].sort((a, b) => (up ? 1 : -1) * order(key(a), key(b)));
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  table.tBodies[0].append(...rows);
}
for (const head of document.querySelectorAll(".sortable th")) {
  head.tabIndex = 0;
  head.onclick = () => sort(head);
  head.onkeydown = event => { if (event.key === "Enter") sort(head); };
}
if (window.Plotly) { draw(); matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw); }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}: dra_ray report</title>
<style>{style}</style></head>
<body><main>
<header><div class=kind>{kind}</div><h1>{title}</h1><p class=headline>{headline}</p>{description}</header>
{body}
<noscript><p>The plots need JavaScript; the tables above show the same numbers.</p></noscript>
</main>
<script>{plotly}</script>
<script>{script}</script>
</body></html>
"""
