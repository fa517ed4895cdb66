"""One self-contained HTML file: no network, plotly inline once, pictures as data URIs, every text from a config escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from dra_ray.config import flatten
from dra_ray.report import plots
from dra_ray.report.collect import LABELS, collect, percent, read_metrics, read_pool, read_rungs
from dra_ray.storage import Store


def write(run: Store) -> Store:
    """Write summary.json and report.html into the run's folder; return the Store of report.html.

    Equal files give an equal report, byte for byte. Raises `DataError` as `collect` does.
    """
    summary = collect(run)
    (run / "summary.json").write_json(summary)
    page = run / "report.html"
    page.write_text(_page(run, summary))
    return page


def _page(run: Store, summary: Mapping[str, Any]) -> str:
    figures = figures_of(run, summary)
    sections = [
        _missing(summary),
        _cards(summary),
        _verdicts(summary, figures),
        _sweep(summary, figures),
        _training(figures),
        _pool(summary, figures),
        _images(run, summary),
        _what_ran(summary),
        _words(summary),
        _files(summary),
    ]
    title = escape(str(summary["name"]))
    return _PAGE.format(
        title=title,
        kind=escape(_KINDS[summary["kind"]]),
        headline=escape(summary["headline"]),
        description=f"<p class=lead>{escape(str(summary['description']))}</p>" if summary["description"] else "",
        body="\n".join(section for section in sections if section),
        style=_STYLE,
        plotly=get_plotlyjs() if figures else "",
        script=_SCRIPT,
    )


_KINDS = {"quickstart": "Quickstart", "sweep": "Sweep", "train": "Training run", "teacher": "Teacher training", "synthetic": "Synthetic set"}


def figures_of(run: Store, summary: Mapping[str, Any]) -> dict[str, plots.Figure]:
    """Name -> figure (plotly as plain data) of a run and its `collect`ed summary, for those that have data."""
    folder = run / "sweep" if summary["kind"] == "quickstart" else run
    finals = summary.get("finals", {})
    curves = {role: read_metrics(run / final["run"] if final["run"] else run) for role, final in finals.items()}
    figures = {
        "attacks": plots.attacks(finals),
        "trade-off": plots.trade_off(summary),
        "rungs": plots.rungs(summary, read_rungs(folder)),
        **{f"against-{field}": plots.against(summary, field) for field in plots.swept(summary)},
        "training": plots.training(curves),
        "losses": plots.losses(curves),
        "pool": plots.pool(read_pool(folder)),
    }
    return {name: figure for name, figure in figures.items() if figure}


# -- sections: each returns its HTML, or "" when the run has nothing to show in it -----------------------------------
def _missing(summary: Mapping[str, Any]) -> str:
    if not summary["missing"]:
        return ""
    title = "Not complete" if summary["status"] == "done" else "Not finished"
    items = "".join(f"<li>{escape(item)}</li>" for item in summary["missing"])
    return f"<section id=missing class=notice><h2>{title}</h2><p>This report shows what is there. Missing:</p><ul>{items}</ul></section>"


def _cards(summary: Mapping[str, Any]) -> str:
    cards: list[tuple[str, str, str]] = []
    for role, final in summary.get("finals", {}).items():
        if "autoattack_accuracy" in final:
            note = f"95 % interval {_span(final['interval'])}; clean {_percent(final['clean_accuracy'])}"
            cards.append((f"AutoAttack accuracy, {LABELS[role]}", _percent(final["autoattack_accuracy"]), note))
    if paired := summary.get("paired"):
        note = f"95 % interval {_span(paired['interval'], sign='+')}; McNemar p = {paired['p_value']:.2g}"
        cards.append(("Difference, DRA − baseline", f"{100 * paired['difference']:+.1f} points".replace("-", "−"), note))
    if asha := summary.get("asha"):
        cards.append(("Trials", _count(asha["trials"]), f"{asha['stopped_early']} stopped early"))
    if (train := summary.get("train")) and train["robust_accuracy"] is not None:
        note = f"clean {_percent(train['clean_accuracy'])}, after epoch {train['epoch']}"
        cards.append(("Robust validation accuracy", _percent(train["robust_accuracy"]), note))
    if pool := summary.get("pool"):
        note = f"{_count(pool['images'])} images in {_count(pool['requests'])} requests, {_count(pool['retries'])} retried"
        cards.append(("Most teacher replicas at once", _count(pool["max_running"]), note))
    if synthetic := summary.get("synthetic"):
        cards.append(("Synthetic images", _count(synthetic["images"]), f"{len(synthetic['counts'])} classes"))
    if teacher := summary.get("teacher"):
        cards.append(("Images the teacher saw", _count(teacher["images_seen"]), f"{_count(teacher.get('params'))} parameters"))
    if summary["elapsed_s"] is not None:
        cards.append(("Time", _duration(summary["elapsed_s"]), "from start to end"))
    body = "".join(
        f"<div class=card><div class=what>{escape(what)}</div><div class=value>{escape(value)}</div><div class=note>{escape(note)}</div></div>"
        for what, value, note in cards
    )
    return f"<section id=figures><h2>Key figures</h2><div class=cards>{body}</div></section>" if cards else ""


def _verdicts(summary: Mapping[str, Any], figures: Mapping[str, plots.Figure]) -> str:
    finals = {role: final for role, final in summary.get("finals", {}).items() if "autoattack_accuracy" in final}
    if not finals:
        return ""
    steps = next(iter(finals.values())).get("pgd_steps")
    head = ["", "trial", "AutoAttack %", "95 % interval", f"PGD-{steps} %" if steps else "PGD %", "clean %", "images", "settings"]
    body = [
        [LABELS[role], final["trial"], percent(final["autoattack_accuracy"]), _span(final["interval"]), percent(final.get("pgd_accuracy"))]
        + [percent(final["clean_accuracy"]), final["images"], _fields(final["fields"])]
        for role, final in finals.items()
    ]
    flags = [f"{LABELS[role]}: {flag}" for role, final in finals.items() for flag in final["flags"]]
    raised = "<p>AutoAttack raised these warnings:</p><ul>" + "".join(f"<li>{escape(flag)}</li>" for flag in flags) + "</ul>"
    return _section(
        "verdict",
        "Test accuracy under attack",
        "AutoAttack is a fixed series of four strong attacks, run without tuning. An image counts as right only if the classifier "
        f"withstands all four.{_budget(finals)} These test images were used for nothing else.",
        _table(head, body),
        raised if flags else "<p class=caption>AutoAttack raised no warnings about the classifier or itself.</p>",
        _paired(summary),
        _plot(
            figures,
            "attacks",
            "Accuracy after each attack",
            "Each attack goes on with the images that are still right, so bars can only "
            "fall from left to right. Whiskers are 95 % intervals (Wilson); they stand for the chance in which images were tested.",
        ),
    )


def _budget(finals: Mapping[str, Mapping[str, Any]]) -> str:
    eps = {final["threat"].get("eps_255") for final in finals.values()} - {None}
    return f" Each may change every pixel by up to {eps.pop():g}/255 of full brightness." if len(eps) == 1 else ""


def _paired(summary: Mapping[str, Any]) -> str:
    paired = summary.get("paired")
    if not paired:
        return ""
    tried = {"with": 0, "without": 0}
    for trial in summary["sweep"]:
        tried["without" if trial["fields"].get("align.weight") == 0 else "with"] += 1
    return (
        f"<p>On the same {paired['images']} images, {paired['only_dra']} are right only with DRA and {paired['only_baseline']} only without it; all "
        f"others agree. McNemar's test asks how often a split at least that uneven comes from a fair coin: p = {paired['p_value']:.2g}. "
        f"<b>What this does not cover:</b> each finalist is one training run with one seed, and was the best on validation images of "
        f"{tried['with']} trials with DRA and {tried['without']} without.</p>"
    )


def _sweep(summary: Mapping[str, Any], figures: Mapping[str, plots.Figure]) -> str:
    trials = summary.get("sweep")
    if not trials:
        return ""
    swept = plots.swept(summary)
    head = ["trial", *(_SHORT.get(field, field) for field in swept), "epochs", "images seen", "clean %", "robust %", "best robust %", "outcome"]
    groups = {final["trial"]: f"{LABELS[role]} finalist" for role, final in summary.get("finals", {}).items()}
    body = [
        [trial["trial"], *(trial["fields"].get(field) for field in swept), trial["epoch"], trial["images_seen"], percent(trial["clean_accuracy"])]
        + [percent(trial["robust_accuracy"]), percent(trial["best_robust_accuracy"]), groups.get(trial["trial"], trial["decision"])]
        for trial in trials
    ]
    effects = "".join(
        _plot(figures, f"against-{field}", f"Robust accuracy over {_SHORT.get(field, field)}", _EFFECTS.get(field, "One mark per trial."))
        for field in swept
    )
    return _section(
        "sweep",
        "The sweep",
        "Each trial trains one classifier with other settings. Accuracies in this section are on validation images, which are never trained on; "
        "robust accuracy is the share still right under a PGD attack. At each rung (a fixed epoch) trials with low robust accuracy stop early, so "
        "that the time goes to the better ones (ASHA). The finalists, the best with DRA and the best without, are always trained to the end.",
        '<div class="grid">'
        + _plot(
            figures,
            "trade-off",
            "Clean against robust accuracy",
            "One mark per trial, at its last validation. Up and to the right is better. "
            "Trials that stopped early have trained less: compare them with care.",
        )
        + _plot(
            figures, "rungs", "Trials over time", "Robust accuracy of each trial; a line ends at its larger mark. Dotted verticals are the rungs."
        )
        + effects
        + "</div>",
        "<h3>All trials</h3><p class=caption>Click on a column's head to sort by it.</p>",
        _table(head, body, sortable=True),
    )


_SHORT = {"align.weight": "λ", "align.sigma": "σ", "synthetic.images": "synthetic images"}
_EFFECTS = {
    "align.weight": "λ is how strongly the classifier's features are pulled towards the teacher's; 0 is training without DRA (the baseline).",
    "align.sigma": "σ is how much noise the teacher sees on the image: low keeps fine detail, high leaves coarse shape. Trials with λ = 0 ask no "
    "teacher and are left out.",
    "synthetic.images": "How many images made by the diffusion model were added to the real ones.",
}


def _training(figures: Mapping[str, plots.Figure]) -> str:
    body = _plot(figures, "training", "Validation accuracy", "Under attack (solid) and on unchanged images (dashed).") + _plot(
        figures,
        "losses",
        "Terms of the loss",
        "What training makes smaller: error on clean images, disagreement between clean and attacked images, "
        "and distance to the teacher's feature (alignment).",
    )
    return _section("training", "Training curves", "", f'<div class="grid">{body}</div>') if body else ""


def _pool(summary: Mapping[str, Any], figures: Mapping[str, plots.Figure]) -> str:
    if "pool" not in figures:
        return ""
    path = " → ".join(str(count) for count in summary["pool"]["replicas"])
    return _section(
        "pool",
        "The teacher pool",
        "While a classifier's attack runs, copies of the frozen teacher (replicas) encode the same images. All trials share them, and their number "
        "follows the demand.",
        _plot(figures, "pool", "Replicas over time", "Demand is the work that arrives, counted in replicas that it keeps busy."),
        f"<p class=caption>Running replicas, in order: {escape(path)}.</p>",
    )


def _images(run: Store, summary: Mapping[str, Any]) -> str:
    captions = {
        "synthetic": "Synthetic images, as used for training: one column per class.",
        "teacher": "Samples of the teacher at the end of its training: their classes should be easy to tell.",
    }
    body = ""
    for part, caption in captions.items():
        name = summary.get(part, {}).get("samples")
        if name:
            data = base64.b64encode((run / name).read_bytes()).decode()
            body += f'<figure><img alt="{part} samples" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    counts = summary.get("synthetic", {}).get("counts")
    table = "<h3>Synthetic images per class</h3>" + _table(list(counts), [[_count(count) for count in counts.values()]]) if counts else ""
    return _section("images", "What the diffusion model makes", "", f'<div class="grid">{body}</div>', table) if body or table else ""


def _what_ran(summary: Mapping[str, Any]) -> str:
    facts: list[tuple[str, Any]] = [("kind", summary["kind"]), ("status", summary["status"]), ("started", summary["created"])]
    labels = {"images_seen": "images the teacher saw", "params": "teacher parameters", "digest": "teacher digest"}
    facts += [(label, summary.get("teacher", {}).get(key)) for key, label in labels.items()]
    if digest := summary.get("synthetic", {}).get("teacher_digest"):
        facts.append(("synthetic images made by teacher", digest))
    facts += flatten(summary.get("synthetic", {}).get("sampler", {}), "sampler ")
    hardware = summary["hardware"]
    facts += list(flatten(hardware, "hardware ")) if isinstance(hardware, Mapping) else [("hardware", hardware)]
    facts += [(f"version of {name}", version) for name, version in summary["versions"].items()]
    known = [[what, _word(value)] for what, value in facts if value is not None]
    config = _table(["field", "value"], [[field, _word(value)] for field, value in flatten(summary["config"])])
    return _section(
        "ran",
        "What ran",
        "",
        _stages(summary["stages"]),
        _table(["what", "value"], known),
        f"<details><summary>Full configuration</summary>{config}</details>" if summary["config"] else "",
    )


def _stages(stages: list[Mapping[str, Any]]) -> str:
    if not stages:
        return ""
    longest = max(stage["seconds"] for stage in stages) or 1
    rows = "".join(
        f"<tr><td>{escape(str(stage['name']))}</td><td class=number>{_duration(stage['seconds'])}</td>"
        f'<td class=share><div style="width:{100 * stage["seconds"] / longest:.1f}%"></div></td></tr>'
        for stage in stages
    )
    return f"<h3>Time per stage</h3><div class=scroll><table><tbody>{rows}</tbody></table></div>"


def _words(summary: Mapping[str, Any]) -> str:
    if not {"sweep", "train"} & set(summary):
        return ""
    items = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in _WORDS)
    return f"<section id=words><h2>Words used here</h2><dl>{items}</dl></section>"


_WORDS = (
    ("clean accuracy", "share of images that are classified right when nobody tampers with them"),
    ("robust accuracy", "share still right after an attacker changed every pixel a little, in the worst way it could find"),
    ("PGD", "a quick attack (projected gradient descent), used during training and for validation"),
    ("AutoAttack", "four strong attacks in a row (APGD-CE, APGD-T, FAB-T, Square), the usual yardstick for the final score"),
    (
        "DRA",
        "diffusion representation alignment: the classifier's feature of an attacked image is pulled towards a diffusion model's feature of the "
        "clean one",
    ),
    ("λ (lambda)", "weight of that pull in the loss; the field align.weight. With 0 there is none: the baseline"),
    ("σ (sigma)", "level of noise at which the teacher encodes an image; the field align.sigma"),
    ("teacher", "the frozen diffusion model that gives those features, and that made the synthetic images"),
    ("95 % interval", "range of values that fit what was measured; with few test images it is wide"),
)


def _files(summary: Mapping[str, Any]) -> str:
    files = summary["files"] | {"this report's numbers, with sources": f"{summary['files'][_MANIFEST].removesuffix('manifest.json')}summary.json"}
    return _section("files", "Where every file is", "", _table(["what", "URI"], [[what, uri] for what, uri in sorted(files.items())]))


_MANIFEST = "this run's manifest"


# -- pieces --------------------------------------------------------------------------------------------------------
def _section(name: str, title: str, lead: str, *parts: str) -> str:
    intro = f"<p>{escape(lead)}</p>" if lead else ""
    return f"<section id={name}><h2>{escape(title)}</h2>{intro}{''.join(parts)}</section>"


def _plot(figures: Mapping[str, plots.Figure], name: str, title: str, caption: str) -> str:
    if name not in figures:
        return ""
    data = json.dumps(figures[name], sort_keys=True, cls=PlotlyJSONEncoder).replace("<", "\\u003c")
    return (
        f'<figure><h3>{escape(title)}</h3><div class=plot role=img aria-label="{escape(title)}"></div>'
        f'<script type="application/json">{data}</script><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _table(head: list[str], body: Iterable[Iterable[Any]], sortable: bool = False) -> str:
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
    return _count(value) if isinstance(value, int) else f"{value:g}"


def _word(value: Any) -> str | None:
    """A value beside its name: as text, so that it is not set apart to the right."""
    return None if value is None else _count(value) if isinstance(value, int) and not isinstance(value, bool) else plots.show(value)


def _fields(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{field} = {plots.show(value)}" for field, value in fields.items()) or "–"


def _count(value: float | None) -> str:
    return "?" if value is None else f"{value:,}".replace(",", "\u202f")


def _percent(accuracy: float) -> str:
    return f"{100 * accuracy:.1f}\u00a0%"


def _span(interval: Iterable[float], sign: str = "") -> str:
    return " to ".join(f"{100 * edge:{sign}.1f}" for edge in interval).replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
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
