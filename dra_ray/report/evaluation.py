"""Sections on the evaluation of a classifier, beside its verdicts: the radius, corruptions,
examples, cost and settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from dra_ray.config import catalogue, flatten
from dra_ray.config.catalogue import STAGES
from dra_ray.errors import DraError
from dra_ray.evaluation.result import Corruptions
from dra_ray.report import examples, html, plots, words
from dra_ray.report.collect import LABELS, RESULT
from dra_ray.report.summary import Evaluated, Finals, Summary
from dra_ray.storage import Store


def sections(
    run: Store, summary: Summary, figures: Mapping[str, plots.Figure]
) -> list[html.Section | None]:
    """What the evaluations of a run found; None where they found nothing of a kind."""
    finals = summary.evaluated
    return [_curve(finals, figures), _corruptions(finals), _examples(run, finals)]


def how(summary: Summary) -> html.Section | None:
    """What the evaluations cost and what their numbers depend on."""
    finals = summary.evaluated
    if not finals:
        return None
    costs = html.grid(*(_cost(final, _title(role, finals)) for role, final in finals.items()))
    spent = [html.Heading("Time per attack"), html.caption(_COST), costs] if costs else []
    others = [
        block for role, final in finals.items() for block in _others(final, _title(role, finals))
    ]
    settings = [html.Heading("Settings"), _settings(finals), _source(finals)]
    return html.section("evaluation", "How it was evaluated", "", *spent, *settings, *others)


def _source(finals: Finals, *names: str) -> html.Block:
    """Which files the numbers above are from."""
    files = [
        f"{final.evaluation}/{name}".removeprefix("/")
        for final in finals.values()
        for name in names or (RESULT,)
    ]
    return html.caption(f"From {', '.join(files)}.")


def _title(role: str, finals: Finals) -> html.Block | None:
    """A heading that tells finalists apart; none where there is one evaluation."""
    return html.Heading(LABELS[role]) if len(finals) > 1 else None


# -- what was found --------------------------------------------------------------------------------
def _curve(finals: Finals, figures: Mapping[str, plots.Figure]) -> html.Section | None:
    measured = {role: final for role, final in finals.items() if final.curve}
    if not measured:
        return None
    figure = html.plot(
        figures.get("curve"),
        "Accuracy over the radius",
        "PGD at each radius on its own, with 95 % intervals; the diamond is AutoAttack, which is "
        "stronger. With a radius that grows the accuracy "
        "must fall towards 0: where it does not, the attack is at fault, not the classifier good.",
    )
    head = [
        "radius (1/255)",
        *(f"{LABELS[role]} %" if len(measured) > 1 else "PGD %" for role in measured),
    ]
    found = {
        role: {row.eps_255: row.accuracy for row in final.curve} for role, final in measured.items()
    }
    radii = sorted({radius for scores in found.values() for radius in scores})
    rows = [(f"{radius:g}", [scores.get(radius) for scores in found.values()]) for radius in radii]
    return html.section(
        "curve",
        "Stronger and weaker attackers",
        "",
        html.grid(figure, html.Shares(head, rows)),
        _source(measured),
    )


def _corruptions(finals: Finals) -> html.Section | None:
    measured = {role: final for role, final in finals.items() if final.corruptions}
    found = {role: final.corruptions for role, final in measured.items() if final.corruptions}
    if not measured:
        return None
    tables = (
        html.Group(html.some(_title(role, measured), _grades(corruptions)))
        for role, corruptions in found.items()
    )
    lead = (
        "Damage that nobody chose with the classifier in mind: noise, blur, weather and "
        "compression, each in severities from mild to strong. "
        "Accuracies are in percent, on the test images; darker is better."
    )
    made = any(corruptions.source == "generated" for corruptions in found.values())
    return html.section(
        "corruptions",
        "Accuracy under corruptions",
        lead,
        html.grid(*tables),
        html.caption(_MADE) if made else None,
        _source(measured),
    )


_MADE = (
    "The corruptions were made here from the test images: they compare classifiers with each "
    "other, and nothing with published numbers."
)


def _grades(corruptions: Corruptions) -> html.Block:
    """A row per kind of corruption, a column per severity, and their means."""
    found: dict[str, dict[int, float]] = {}
    for row in corruptions.rows:
        found.setdefault(row.name, {})[row.severity] = row.accuracy
    grades = sorted({grade for scores in found.values() for grade in scores})
    rows: list[tuple[str, list[float | None]]] = [
        (name.replace("_", " "), [*(scores.get(grade) for grade in grades), _mean(scores.values())])
        for name, scores in found.items()
    ]
    rows.append(
        (
            "all",
            [
                *(
                    _mean(scores[grade] for scores in found.values() if grade in scores)
                    for grade in grades
                ),
                corruptions.mean,
            ],
        )
    )
    return html.Shares(["severity", *map(str, grades), "mean"], rows)


def _mean(scores: Iterable[float]) -> float:
    known = list(scores)
    return sum(known) / len(known)


def _examples(run: Store, finals: Finals) -> html.Section | None:
    blocks = [
        block
        for role, final in finals.items()
        for block in (_title(role, finals), *_shown(run, final))
    ]
    return html.section("examples", "What fooled it", "", *blocks)


def _shown(run: Store, final: Evaluated) -> list[html.Block]:
    folder = run / final.evaluation if final.evaluation else run
    try:
        found = examples.find(_training_run(folder), folder, final.threat)
    except DraError as error:
        return [html.caption(f"No examples are shown: {error}.")]
    if not found:
        return [
            html.caption("No examples are shown: no attack fooled the classifier on any image.")
        ]
    factor = examples.amplification(found)
    lead = (
        "The first test image of each class that the classifier got right until an attack found a "
        "change, within the bounds, that fools it."
    )
    note = f"{lead} The change is amplified {factor} times around grey, which stands for none."
    if found[0].predicted:
        note += (
            " The classes that the classifier sees were computed for this page; on another machine "
            "an image at the edge may fall to the other side."
        )
    triples = [html.Pictures(_named(example), _triple(example, factor)) for example in found]
    return [
        html.Group(triples, "examples"),
        html.caption(note),
        _source({"": final}, "adversarial.npz", "per_sample.npz"),
    ]


def _training_run(evaluation: Store) -> Store:
    """Evaluations of a run lie in RUN/evaluation, with other settings in RUN/evaluation/NAME;
    others lie anywhere.
    """
    found = re.fullmatch(r"(.+)/evaluation(/[^/]+)?/*", evaluation.resolved().uri)
    return Store(found[1]) if found else evaluation


def _named(example: examples.Example) -> str:
    return f"Image {example.index}: {example.label}, fooled by {catalogue.label(example.attack)}"


def _triple(example: examples.Example, factor: int) -> list[html.Picture]:
    clean, fooled = (
        (f", seen as {name}" for name in example.predicted) if example.predicted else ("", "")
    )
    shown = [
        (example.clean, f"clean{clean}"),
        (example.adversarial, f"attacked{fooled}"),
        (examples.difference(example, factor), f"change × {factor}"),
    ]
    return [
        html.Picture(examples.png(image), f"{_named(example)}: {label}", label)
        for image, label in shown
    ]


def _others(final: Evaluated, title: html.Block | None) -> list[html.Block]:
    """Evaluations of the same classifier with other settings: their pages are written by
    themselves.
    """
    if not final.others:
        return []
    head = ["folder", "AutoAttack %", "95 % interval", "PGD %", "clean %", "images"]
    rows = [
        [
            f"{final.evaluation}/{row.name}".removeprefix("/"),
            words.in_percent(row.autoattack_accuracy),
            words.span(row.interval or []),
            words.in_percent(row.pgd_accuracy),
            words.in_percent(row.clean_accuracy),
            row.images,
        ]
        for row in final.others
    ]
    note = html.caption("dra report writes a page for each of these folders.")
    return html.some(html.Heading("With other settings"), title, html.Table(head, rows), note)


# -- what it cost, and how it was set --------------------------------------------------------------
_COST = (
    "Seconds of work, summed over batches; each batch is a task, and several run at the same time."
)


def _cost(final: Evaluated, title: html.Block | None) -> html.Block | None:
    spent = final.attack_s
    if not spent:
        return None
    order = dict.fromkeys(
        stage for stage in ("clean", *final.after_attack, *spent) if stage in spent
    )
    tasks = final.tasks
    rows = [
        (
            STAGES[stage].label if stage in STAGES else stage,
            spent[stage],
            words.number(tasks[stage], "task") if stage in tasks else "",
        )
        for stage in order
    ]
    total = f"Together {words.duration(sum(spent.values()))} of work"
    total += (
        "." if final.elapsed_s is None else f" in {words.duration(final.elapsed_s)} of waiting."
    )
    resumed = final.resumed_batches
    if resumed is not None:
        total += (
            f" {words.number(resumed, 'batch', 'batches')} came from an earlier, interrupted "
            "evaluation."
            if resumed
            else " It ran in one go: nothing was resumed."
        )
    return html.Group(html.some(title, html.Bars(rows), html.caption(total)))


_SETTINGS = {
    "version": "version of AutoAttack",
    "level": "level",
    "streams": "random numbers per",
    "threat.norm": "norm of the change",
    "threat.eps_255": "radius ε, in 1/255",
    "seed": "seed",
    "batch": "images per batch",
    "batch_asked": "images per batch, as asked for",
    "pgd_steps": "steps of PGD",
    "pgd_restarts": "restarts of PGD",
    "eot": "passes per gradient of PGD",
}
_MEANINGS = {
    "reference": "reference: to the bit what AutoAttack gives",
    "fast": "fast: the same mathematics, rounded otherwise",
    "screen": "screen: an upper bound, for sweeps only",
}


def _settings(finals: Finals) -> html.Block:
    """A row per field that one of the evaluations has, a column per evaluation."""
    columns = {role: _fields(final) for role, final in finals.items()}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    head = ["field", *(LABELS[role] if len(finals) > 1 else "value" for role in finals)]
    rows = [
        [name, *(words.beside_name(column.get(name)) for column in columns.values())]
        for name in names
    ]
    return html.Table(head, rows)


def _fields(final: Evaluated) -> dict[str, Any]:
    fields = {name.partition(".")[0] for name in _SETTINGS}
    known = dict(flatten(final.model_dump(include=fields, exclude_unset=True)))
    found = {
        label: _MEANINGS.get(known[field], known[field])
        for field, label in _SETTINGS.items()
        if field in known
    }
    found |= {"test images": final.images}
    trees: dict[str, Mapping[str, Any]] = {
        "effort": final.effort,
        "subject": final.subject,
        "hardware": final.numerics,
        "version of": final.versions,
    }
    for label, tree in trees.items():
        found |= dict(flatten(tree, f"{label} "))
    return found
