"""The page of one run, or of one evaluation: a section for everything that its files tell."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator, Mapping

from dra_ray import runs
from dra_ray.config import catalogue, flatten
from dra_ray.inspection.state import read_rungs
from dra_ray.report import command, evaluation, html, plots, sweep_page, words
from dra_ray.report.collect import (
    EVALUATION,
    LABELS,
    PARTS,
    also_differ,
    collect,
    outcome,
    read_metrics,
    read_pool,
)
from dra_ray.report.findings import Findings, find, read_late
from dra_ray.report.summary import Finals, Summary
from dra_ray.runs import TeacherRow, ValidationRow
from dra_ray.storage import Store
from dra_ray.sweeps import equal


def write(run: Store, refresh_s: int | None = None) -> Store:
    """Write summary.json and report.html into the run's folder; return the Store of report.html.
    A browser that shows it loads it anew every `refresh_s`, where that is given.

    Equal files give an equal report, byte for byte. Raises `DataError` as `collect` does.
    """
    summary, found = collect(run), findings_of(run)
    if found is not None:
        summary = summary.model_copy(update={"findings": found.tree()})
    (run / runs.SUMMARY).write_json(summary.tree())
    page = run / "report.html"
    page.write_text(_page(run, summary, found, refresh_s))
    return page


def findings_of(run: Store) -> Findings | None:
    """What the sweep in a folder, or in a quickstart's, found; None where no sweep has scores."""
    folder = next((place for place in (run, run / "sweep") if (place / runs.RUNGS).exists()), None)
    manifest = runs.read_manifest(folder) if folder else None
    rungs = read_rungs(folder) if folder else []
    if not (folder and manifest and manifest.kind == "sweep" and rungs):
        return None
    return find(manifest, rungs, read_late(folder))


def _page(
    run: Store, summary: Summary, found: Findings | None, refresh_s: int | None = None
) -> str:
    figures = figures_of(run, summary)
    sections = [
        _missing(summary),
        _cards(summary),
        _verdicts(summary, figures),
        *evaluation.sections(run, summary, figures),
        *sweep_page.sections(summary, found),
        _sweep(run, summary, figures),
        _training(figures),
        _pool(summary, figures),
        _images(run, summary, figures),
        evaluation.how(summary),
        _what_ran(run, summary),
        _words(summary),
        _files(run, summary),
    ]
    title, kind = str(summary.title), _KINDS[summary.kind]
    return html.page(
        title,
        kind,
        summary.headline,
        sections,
        str(summary.description or ""),
        f"{title} ({kind.lower()})",
        refresh_s=refresh_s,
    )


_KINDS = {
    "quickstart": "Quickstart",
    "sweep": "Sweep",
    "train": "Training run",
    "teacher": "Teacher training",
    "synthetic": "Synthetic set",
    "evaluation": "Evaluation",
}


def figures_of(run: Store, summary: Summary) -> dict[str, plots.Figure]:
    """Name -> figure (plotly as plain data) of a run and its `collect`ed summary, for those that
    have data.
    """
    folder = _sweep_folder(run, summary)
    rungs = read_rungs(folder)
    curves = {
        role: read_metrics(run / final.run if final.run else run, ValidationRow)
        for role, final in summary.finals.items()
    }
    figures = {
        "attacks": plots.attacks(summary.evaluated),
        "curve": plots.curve(summary.evaluated),
        "trade-off": plots.trade_off(summary),
        "rungs": plots.rungs(summary, rungs),
        **{
            f"against-{field}": plots.against(summary, field, rungs)
            for field in plots.swept(summary)
        },
        "training": plots.training(curves),
        "losses": plots.losses(curves),
        "pool": plots.pool(read_pool(folder)),
        "teacher": plots.teacher(read_metrics(run / PARTS[summary.kind]["teacher"], TeacherRow))
        if summary.teacher
        else None,
    }
    return {name: figure for name, figure in figures.items() if figure}


def _sweep_folder(run: Store, summary: Summary) -> Store:
    return run / "sweep" if summary.kind == "quickstart" else run


# -- sections: None where the run has nothing to show in one ---------------------------------------
def _missing(summary: Summary) -> html.Section | None:
    if not summary.missing:
        return None
    title = "Not complete" if summary.status == "done" else "Not finished"
    lead = "This report shows what is there. Missing:"
    return html.Section("missing", title, lead, [html.Bullets(summary.missing)], notice=True)


def _cards(summary: Summary) -> html.Section | None:
    cards = [*_tested(summary), *_trained(summary), *_made(summary)]
    if summary.elapsed_s is not None:
        cards.append(html.Card("Time", words.duration(summary.elapsed_s), "from start to end"))
    return html.section("figures", "Key figures", "", html.Cards(cards)) if cards else None


def _tested(summary: Summary) -> Iterator[html.Card]:
    """Scores on test images."""
    for role, final in summary.evaluated.items():
        owner = "" if role == "run" else f", {LABELS[role]}"
        score = words.percent(final.autoattack_accuracy)
        clean = words.percent(final.clean_accuracy)
        note = f"95 % interval {words.span(final.interval)}; clean {clean}"
        yield html.Card(f"AutoAttack accuracy{owner}", score, note)
        if corruptions := final.corruptions:
            mean = words.percent(corruptions.mean)
            note = f"mean of {len(corruptions.rows)} kinds and severities"
            yield html.Card(f"Accuracy under corruptions{owner}", mean, note)
    if paired := summary.paired:
        interval = words.span(paired.interval, sign=True)
        note = f"95 % interval {interval}; McNemar p = {paired.p_value:.2g}"
        gap = f"{words.points(paired.difference)} points"
        yield html.Card("Difference, DRA − baseline", gap, note)


def _trained(summary: Summary) -> Iterator[html.Card]:
    """How far trials or the one run came."""
    if asha := summary.asha:
        counts = {
            "trained to the end": asha.trained_to_the_end,
            "stopped early": asha.stopped_early,
            "failed": asha.failed,
            "unfinished": asha.unfinished,
            "not started": asha.not_started,
        }
        note = ", ".join(
            f"{words.count(number)} {what}" for what, number in counts.items() if number
        )
        yield html.Card("Trials", words.count(asha.trials), note)
    if (train := summary.train) and train.robust_accuracy is not None:
        note = f"clean {words.percent(train.clean_accuracy)}, after epoch {train.epoch}"
        yield html.Card("Robust validation accuracy", words.percent(train.robust_accuracy), note)


def _made(summary: Summary) -> Iterator[html.Card]:
    """What the diffusion model did."""
    if pool := summary.pool:
        note = (
            f"{words.count(pool.images)} images in {words.count(pool.requests)} requests, "
            f"{words.count(pool.retries)} retried"
        )
        yield html.Card("Most teacher replicas at once", words.count(pool.max_running), note)
    if synthetic := summary.synthetic:
        note = f"{len(synthetic.counts)} classes"
        yield html.Card("Synthetic images", words.count(synthetic.images), note)
    if teacher := summary.teacher:
        note = f"{words.count(teacher.params)} parameters"
        yield html.Card("Images the teacher saw", words.count(teacher.images_seen), note)


def _verdicts(summary: Summary, figures: Mapping[str, plots.Figure]) -> html.Section | None:
    finals = summary.evaluated
    if not finals:
        return None
    steps = next(iter(finals.values())).pgd_steps
    head = [
        "AutoAttack %",
        "95 % interval",
        f"PGD-{steps} %" if steps else "PGD %",
        "clean %",
        "images",
    ]
    several = len(finals) > 1  # the page of one run needs no column that names it
    rows = [
        [
            *([LABELS[role], final.trial] if several else []),
            words.in_percent(final.autoattack_accuracy),
            words.span(final.interval),
            words.in_percent(final.pgd_accuracy),
            words.in_percent(final.clean_accuracy),
            final.images,
            *([words.fields(final.fields)] if several else []),
        ]
        for role, final in finals.items()
    ]
    return html.section(
        "verdict",
        "Test accuracy under attack",
        f"{_series(finals)} These test images were used for nothing else.",
        html.Table(["", "trial", *head, "settings"] if several else head, rows),
        *_warnings(finals),
        *_paired(summary),
        html.plot(
            figures.get("attacks"),
            "Accuracy after each attack",
            "Each attack goes on with the images that are still right, so bars can only "
            "fall from left to right. Whiskers are 95 % intervals (Wilson); they stand for the "
            "chance in which images were tested.",
        ),
    )


def _series(finals: Finals) -> str:
    """What AutoAttack did, as far as the evaluations agree."""
    run = {tuple(final.after_attack) for final in finals.values()}
    whole = run == {catalogue.VERSIONS["standard"].attacks}
    named = (
        ""
        if whole or len(run) > 1
        else f" ({', '.join(catalogue.label(attack) for attack in run.pop())})"
    )
    return (
        f"AutoAttack is a fixed series of {'four ' if whole else ''}strong attacks{named}, run "
        "without tuning. An image counts as right only if the "
        f"classifier withstands {'all four' if whole else 'all of them'}.{_budget(finals)}"
    )


def _budget(finals: Finals) -> str:
    budgets = {
        (final.threat.norm, final.threat.eps_255)
        for final in finals.values()
        if final.threat.eps_255 is not None
    }
    if len(budgets) != 1:
        return ""
    norm, eps = budgets.pop()
    if norm == "l2":
        return (
            f" Each may change an image by an L2 length of up to {eps:g}/255 = {eps / 255:.3g}, "
            "where a pixel's full brightness is 1."
        )
    return f" Each may change every pixel by up to {eps:g}/255 of full brightness."


def _warnings(finals: Finals) -> list[html.Block]:
    """Flags as sentences; of a run of its own without its name."""
    named = {role: "" if len(finals) == 1 else f"{LABELS[role]}: " for role in finals}
    flags = [
        f"{named[role]}{_sentence(flag)}" for role, final in finals.items() for flag in final.flags
    ]
    if not flags:
        return [html.caption("AutoAttack raised no warnings about the classifier or itself.")]
    return [html.Text("AutoAttack raised these warnings:"), html.Bullets(flags)]


def _sentence(flag: str) -> str:
    return flag if flag.endswith((".", "!", "?")) else f"{flag}."


def _paired(summary: Summary) -> list[html.Block]:
    paired = summary.paired
    if not paired:
        return []
    tried = {"with": 0, "without": 0}
    for trial in summary.sweep:
        tried["without" if trial.fields.get("align.weight") == 0 else "with"] += 1
    also = ""
    if paired.also_differ:
        also = (
            f" The two also differ in {also_differ(paired.also_differ)}: below, the sweep's "
            "trials are compared like with like."
        )
    return [
        html.Text(
            f"On the same {paired.images} images, {paired.only_dra} are right only with DRA "
            f"and {paired.only_baseline} only without it; "
            "all others agree. McNemar's test asks how often a split at least that uneven comes "
            f"from a fair coin: p = {paired.p_value:.2g}."
        ),
        html.Text(
            "Each finalist is one training run with one seed, and was the best on validation "
            f"images of {tried['with']} trials with DRA and "
            f"{tried['without']} without.{also}",
            lead="What this does not cover:",
        ),
    ]


def _sweep(
    run: Store, summary: Summary, figures: Mapping[str, plots.Figure]
) -> html.Section | None:
    trials = summary.sweep
    if not trials:
        return None
    swept = plots.swept(summary)
    rungs = read_rungs(_sweep_folder(run, summary))
    effects = [
        html.plot(
            figures.get(f"against-{field}"),
            f"Robust accuracy over {_SHORT.get(field, field)}",
            _effect(summary, field, rungs),
        )
        for field in swept
    ]
    return html.section(
        "sweep",
        "The sweep",
        "Each trial trains one classifier with other settings. Accuracies in this section are on "
        "validation images, which are never trained on; "
        "robust accuracy is the share still right under a PGD attack. At each rung (a fixed epoch) "
        "trials with low robust accuracy stop early, so "
        "that the time goes to the better ones. The finalists, the best with DRA and the "
        "best without, are always trained to the end.",
        html.grid(
            html.plot(
                figures.get("trade-off"),
                "Clean against robust accuracy",
                "One mark per trial, at its last validation. Up and to the right is better. "
                "Trials that stopped early have trained less: compare them with care.",
            ),
            html.plot(
                figures.get("rungs"),
                "Trials over time",
                "Robust accuracy of each trial; a line ends at its larger mark. Dotted verticals "
                "are the rungs.",
            ),
            *effects,
        ),
        *_matched(summary, swept),
        html.Heading("All trials"),
        html.caption("Click on a column's head to sort by it."),
        sweep_page.fold(f"{len(trials)} trials", _every_trial(summary, swept)),
    )


def _every_trial(summary: Summary, swept: list[str]) -> html.Table:
    head = [
        "trial",
        *(_SHORT.get(field, field) for field in swept),
        "epochs",
        "images seen",
        "clean %",
        "robust %",
        "best robust %",
        "outcome",
    ]
    groups = {final.trial: f"{LABELS[role]} finalist" for role, final in summary.finals.items()}
    rows = [
        [
            trial.trial,
            *(trial.fields.get(field) for field in swept),
            trial.epoch,
            trial.images_seen,
            words.in_percent(trial.clean_accuracy),
            words.in_percent(trial.robust_accuracy),
            words.in_percent(trial.best_robust_accuracy),
            groups.get(trial.trial, outcome(trial)),
        ]
        for trial in summary.sweep
    ]
    return html.Table(head, rows, sortable=True)


def _effect(summary: Summary, field: str, rungs: plots.Rungs) -> str:
    """What the field is, and which trials are compared."""
    found = plots.effects(summary, field, rungs)
    epochs = ", ".join(str(epoch) for epoch in dict.fromkeys(effect.epoch for effect in found))
    about = [
        _EFFECTS.get(field, ""),
        f"All marks are scores after epoch {epochs}, the last that some trial of every value has "
        "reached.",
    ]
    if stopped := sum(len(effect.left_out) for effect in found):
        about.append(
            f"{words.number(stopped, 'trial')} stopped before and "
            f"{'is' if stopped == 1 else 'are'} left out."
        )
    if len(found) > 1:
        about.append(
            "Each line is another attack or other validation images: compare within a line."
        )
    return " ".join(part for part in about if part)


def _matched(summary: Summary, swept: list[str]) -> list[html.Block]:
    """DRA against none where all else is equal, and which axes have no such comparison."""
    notes: list[html.Block] = [
        html.caption(_TASKS.format(field)) for field in swept if field in equal.TASK
    ]
    if not summary.equal:
        return notes
    rows = [
        [
            words.fields(match.shared),
            match.epoch,
            match.aligned,
            words.in_percent(match.aligned_accuracy),
            match.baseline,
            words.in_percent(match.baseline_accuracy),
            words.points(match.aligned_accuracy - match.baseline_accuracy),
        ]
        for match in summary.equal
    ]
    head = [
        "equal in both",
        "after epoch",
        "best with DRA",
        "robust %",
        "best without",
        "robust %",
        "difference",
    ]
    lead = (
        "The best trial with DRA and the best without, where everything else is equal, after the "
        "last epoch that both kinds have reached. "
        "One run each: differences of a few points can be chance."
    )
    return [html.Heading("Like with like"), html.caption(lead), html.Table(head, rows), *notes]


_TASKS = (
    "{} decides what robust accuracy means, so its values are not compared with each other: each "
    "is another attack or other images."
)
_SHORT = {"align.weight": "λ", "align.sigma": "σ", "synthetic.images": "synthetic images"}
_EFFECTS = {
    "align.weight": "λ is how strongly the classifier's features are pulled towards the teacher's; "
    "0 is training without DRA (the baseline).",
    "align.sigma": "σ is how much noise the teacher sees on the image: low keeps fine detail, high "
    "leaves coarse shape. Trials with λ = 0 ask no "
    "teacher and are left out.",
    "synthetic.images": "How many images made by the diffusion model were added to the real ones.",
}


def _training(figures: Mapping[str, plots.Figure]) -> html.Section | None:
    return html.section(
        "training",
        "Training curves",
        "",
        html.grid(
            html.plot(
                figures.get("training"),
                "Validation accuracy",
                "Under attack (solid) and on unchanged images (dashed).",
            ),
            html.plot(
                figures.get("losses"),
                "Terms of the loss",
                "What training makes smaller: error on clean images, disagreement between clean "
                "and attacked images, "
                "and distance to the teacher's feature (alignment).",
            ),
        ),
    )


def _pool(summary: Summary, figures: Mapping[str, plots.Figure]) -> html.Section | None:
    if "pool" not in figures or summary.pool is None:
        return None
    path = " → ".join(str(count) for count in summary.pool.replicas)
    return html.section(
        "pool",
        "The teacher pool",
        "While a classifier's attack runs, copies of the frozen teacher (replicas) encode the same "
        "images. All trials share them, and their number "
        "follows the demand.",
        html.plot(
            figures.get("pool"),
            "Replicas over time",
            "Demand is the work that arrives, counted in replicas that it keeps busy.",
        ),
        html.caption(f"Running replicas, in order: {path}."),
    )


def _images(
    run: Store, summary: Summary, figures: Mapping[str, plots.Figure]
) -> html.Section | None:
    captions = {
        "synthetic": "Synthetic images, as used for training: one column per class.",
        "teacher": "Samples of the teacher at the end of its training: their classes should be "
        "easy to tell.",
    }
    parts = {"synthetic": summary.synthetic, "teacher": summary.teacher}
    sheets = {name: part.samples for name, part in parts.items() if part}
    pictures = (
        html.Picture((run / name).read_bytes(), f"{part} samples", captions[part])
        for part, name in sheets.items()
        if name
    )
    loss = html.plot(
        figures.get("teacher"),
        "Loss of the teacher",
        "Mean over the steps since the last row of its log. It falls fast and then slowly; images "
        "still get better while it hardly moves.",
    )
    return html.section(
        "images", "The diffusion model", "", html.grid(*pictures, loss), _per_class(summary)
    )


def _per_class(summary: Summary) -> html.Block | None:
    """How many synthetic images each class has: one number where they are equal."""
    counts = summary.synthetic.counts if summary.synthetic else {}
    if not counts:
        return None
    if len(set(counts.values())) == 1:
        each = words.count(next(iter(counts.values())))
        return html.caption(f"Each of the {len(counts)} classes has {each} synthetic images.")
    rows = [[label, count] for label, count in counts.items()]
    return html.Details("Synthetic images per class", [html.Table(["class", "images"], rows)])


def _commands(run: Store, summary: Summary) -> list[str]:
    """What to type: the code's commit, the run, and its evaluation."""
    made = command.reproduce(summary.kind, str(summary.name), summary.config)
    commands = [made] if made else []
    final = summary.evaluated.get("run")
    if summary.kind == "train" and final and final.settings:
        commands.append(command.evaluate(run.uri, summary.config, final.settings))
    if commands and (commit := str(summary.versions.get("commit", ""))):
        commands.insert(
            0,
            f"git checkout {commit.removesuffix('-dirty')}"
            + ("  # files differed from it" if commit.endswith("-dirty") else ""),
        )
    return commands


_REPRODUCED = (
    "The recipe that is nearest, with every field that differs. Equal configs and versions give "
    "equal results on one kind of machine."
)


def _what_ran(run: Store, summary: Summary) -> html.Section | None:
    known = [
        [what, words.beside_name(value)] for what, value in _facts(summary) if value is not None
    ]
    config = [[field, words.beside_name(value)] for field, value in flatten(summary.config)]
    stages = [(stage.name, stage.seconds, "") for stage in summary.stages]
    commands = _commands(run, summary)
    return html.section(
        "ran",
        "What ran",
        "",
        html.Heading("To reproduce it") if commands else None,
        html.Code("\n".join(commands)) if commands else None,
        html.caption(_REPRODUCED) if commands else None,
        html.Heading("Time per stage") if stages else None,
        html.Bars(stages) if stages else None,
        html.Table(["what", "value"], known),
        html.Details("Full configuration", [html.Table(["field", "value"], config)])
        if config
        else None,
    )


def _facts(summary: Summary) -> list[tuple[str, object]]:
    """What the run was, was made with, and ran on."""
    facts: list[tuple[str, object]] = [
        ("kind", summary.kind),
        ("status", summary.status),
        ("started", summary.created),
    ]
    if teacher := summary.teacher:
        facts += [
            ("images the teacher saw", teacher.images_seen),
            ("teacher parameters", teacher.params),
            ("teacher digest", teacher.digest),
        ]
    if synthetic := summary.synthetic:
        facts.append(("synthetic images made by teacher", synthetic.teacher_digest))
        facts += flatten(synthetic.sampler, "sampler ")
    hardware = summary.hardware
    facts += (
        list(flatten(hardware, "hardware "))
        if isinstance(hardware, Mapping)
        else [("hardware", hardware)]
    )
    evaluated = [final.versions for final in summary.evaluated.values()]
    if (
        summary.kind != EVALUATION or summary.versions not in evaluated
    ):  # which lists them among its own settings
        facts += [(f"version of {name}", version) for name, version in summary.versions.items()]
    return facts


def _words(summary: Summary) -> html.Section | None:
    trained = bool(summary.asha or summary.train)
    if not trained and not summary.finals:
        return None
    known = _WORDS if trained else [row for row in _WORDS if row[0] in _OF_EVALUATION]
    return html.section("words", "Words used here", "", html.Terms(known))


_OF_EVALUATION = ("clean accuracy", "robust accuracy", "PGD", "AutoAttack", "95 % interval")
_WORDS = (
    ("clean accuracy", "share of images that are classified right when nobody tampers with them"),
    (
        "robust accuracy",
        "share still right after an attacker changed every pixel a little, in the worst way it "
        "could find",
    ),
    ("PGD", "a quick attack (projected gradient descent), used during training and for validation"),
    (
        "AutoAttack",
        "four strong attacks in a row (APGD-CE, APGD-T, FAB-T, Square), the usual yardstick for "
        "the final score",
    ),
    (
        "DRA",
        "diffusion representation alignment: the classifier's feature of an attacked image is "
        "pulled towards a diffusion model's feature of the "
        "clean one",
    ),
    (
        "λ (lambda)",
        "weight of that pull in the loss; the field align.weight. With 0 there is none: the "
        "baseline",
    ),
    ("σ (sigma)", "level of noise at which the teacher encodes an image; the field align.sigma"),
    (
        "teacher",
        "the frozen diffusion model that gives those features, and that made the synthetic images",
    ),
    (
        "95 % interval",
        "range of values that fit what was measured; with few test images it is wide",
    ),
)


def _files(run: Store, summary: Summary) -> html.Section | None:
    files = summary.files | {"this report's numbers, with sources": (run / runs.SUMMARY).uri}
    rows = [[what, _link(run, uri)] for what, uri in sorted(files.items())]
    return html.section("files", "Where every file is", "", html.Table(["what", "URI"], rows))


def _link(run: Store, uri: str) -> html.Link | str:
    """To a file below the page, wherever the folder is moved to; others as they are."""
    below = uri.removeprefix(f"{run.uri.rstrip('/')}/")
    return html.Link(uri, f"./{urllib.parse.quote(below)}") if below != uri else uri
