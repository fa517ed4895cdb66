"""The sections of a sweep's page that say what it found and what it cost."""

from __future__ import annotations

from dra_ray.report import html, planned, sweep_plots, words
from dra_ray.report.answers import attack_label, paragraph
from dra_ray.report.findings import Findings
from dra_ray.report.plots import swept
from dra_ray.report.summary import Summary
from dra_ray.runs import Planned
from dra_ray.sweeps.effects import Curve
from dra_ray.sweeps.equal import Refused
from dra_ray.sweeps.fits import Fit

FOLDED = 60  # rows from which a table of trials is folded


def sections(summary: Summary, found: Findings | None) -> list[html.Section | None]:
    """Of a sweep, in the order of the page; none of another run."""
    if found is None:
        return []
    return [
        _answer(found),
        _late(found),
        _axes(summary, found),
        _front(found),
        _more(found),
        _health(found),
        _plan(summary),
    ]


def _answer(found: Findings) -> html.Section | None:
    lead = paragraph(found.answer)
    if isinstance(found.answer, Refused):
        return html.section("answer", "The answer", "", html.Text(lead))
    ties = found.answer.ties
    return html.section(
        "answer",
        "The answer",
        "",
        html.Text(lead),
        html.caption(
            "Trials are compared on the same validation images after equally many training "
            "images. The winner is in winner.yaml, a config for dra train."
        ),
        html.Details(
            f"{words.number(len(ties), 'trial')} that cannot be told apart from the winner",
            [html.Bullets(ties)],
        )
        if ties
        else None,
    )


def _late(found: Findings) -> html.Section | None:
    """Verdicts of stronger attacks beside PGD's; nothing of a sweep without them."""
    if not found.late:
        return None
    rows = [
        [
            late.trial,
            late.epoch,
            words.in_percent(late.by_pgd),
            attack_label(late.attack),
            words.in_percent(late.robust_accuracy),
            late.images,
            late.reason or "",
        ]
        for late in found.late
    ]
    named = ["trial", "epoch", "by PGD %", "attack", "by it %", "images", "why there is no verdict"]
    return html.section(
        "late",
        "Stronger attacks",
        "PGD decides what is stopped; these verdicts on the same checkpoints came beside the "
        "training and at its end.",
        fold("Verdicts of stronger attacks", html.Table(named, rows, True)),
    )


def _axes(summary: Summary, found: Findings) -> html.Section | None:
    weighed = found.importance
    refused = html.caption(_sentence(weighed.reason)) if isinstance(weighed, Refused) else None
    curves = [
        html.plot(sweep_plots.effect(curve), f"Accuracy over {field}", _effect(curve))
        for field, of_field in found.effects.items()
        for curve in of_field
    ]
    return html.section(
        "axes",
        "What each axis is worth",
        "",
        refused,
        html.grid(
            html.plot(
                sweep_plots.importance(weighed),
                "Importance of the axes",
                ""
                if isinstance(weighed, Refused)
                else "How much more often the best quarter of the trials has certain values of an "
                f"axis than all trials have (PED-ANOVA), of {weighed.trials} trials after "
                f"{words.count(weighed.images_seen)} images. Whiskers are 95 % bootstrap "
                "intervals; grey bars are no longer than chance makes them.",
            ),
            html.plot(
                sweep_plots.parallel(summary.sweep, swept(summary)),
                "Parallel coordinates",
                "A line per trial, at its last validation. Trials that stopped early have trained "
                "less.",
            ),
            *curves,
        ),
    )


def _effect(curve: Curve) -> str:
    about = [
        f"Means over trials after {words.count(curve.images_seen)} images, with 95 % intervals "
        "over images and trials."
    ]
    if curve.left_out:
        about.append(f"{words.number(len(curve.left_out), 'trial')} stopped before.")
    if curve.task:
        about.append(f"Of {words.fields(curve.task)}.")
    if curve.unequal:
        about.append(
            f"The values of {' and '.join(curve.unequal)} are not spread alike over these, so part "
            "of the difference may be theirs."
        )
    return " ".join(about)


def _front(found: Findings) -> html.Section | None:
    front = found.front
    if isinstance(front, Refused):
        return None
    rows = [
        [
            place.trial,
            words.in_percent(place.clean_accuracy),
            words.in_percent(place.robust_accuracy),
            words.in_percent(place.share_on_front),
        ]
        for place in front.best
    ]
    return html.section(
        "front",
        "Clean against robust accuracy",
        "Of the trials that were trained to the end: those that no other beats in both.",
        html.plot(
            sweep_plots.pareto(front),
            "The front",
            f"After {words.count(front.images_seen)} images.",
        ),
        fold(
            "Trials on the front",
            html.Table(["trial", "clean %", "robust %", "on it in % of resamples"], rows, True),
        ),
    )


def _more(found: Findings) -> html.Section | None:
    fitted = [fit for fit in found.fits if isinstance(fit, Fit)]
    refused = [_sentence(fit.reason) for fit in found.fits if isinstance(fit, Refused)]
    if not found.fits:
        return None
    return html.section(
        "more",
        "What more would buy",
        "Accuracy as ceiling − gain · x^−exponent. Extrapolations hold only if nothing else "
        "changes.",
        html.grid(
            *(
                html.plot(
                    sweep_plots.fit(fit),
                    f"{fit.what.capitalize()} accuracy over {fit.of.replace('_', ' ')}",
                    _law(fit),
                )
                for fit in fitted
            )
        ),
        html.Bullets(refused) if refused else None,
    )


def _law(fit: Fit) -> str:
    far = "; ".join(
        f"at {words.count(guess.x)} about {words.percent(guess.accuracy)} (95 % interval "
        f"{words.span(guess.interval)})"
        for guess in fit.beyond
    )
    notes = "".join(f" {_sentence(note)}" for note in fit.notes)
    return (
        f"Exponent {fit.exponent:.2g} ({fit.exponent_interval[0]:.2g} to "
        f"{fit.exponent_interval[1]:.2g}). {_sentence(far)}{notes}"
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _health(found: Findings) -> html.Section | None:
    """What early stopping did, in words."""
    if found.health is None:
        return None
    return html.section("health", "Early stopping", "", html.Bullets(found.health.sentences))


def _plan(summary: Summary) -> html.Section | None:
    """What was planned against what was spent, where the manifest has a plan."""
    if not summary.plan:
        return None
    plan = Planned.model_validate(summary.plan)
    compared = planned.compare(plan, summary.spent)
    rows = [
        [
            row.what,
            *(
                round(value) if row.what == "images" and value is not None else value
                for value in (row.planned, *(row.interval or (None, None)), row.spent)
            ),
            round(100 * row.share),
        ]
        for row in compared
    ]
    return html.section(
        "plan",
        "Plan and actual",
        planned.sentence(plan, compared),
        html.Table(["what", "planned", "at least", "at most", "spent", "% of the plan"], rows),
        html.caption(
            "The plan was made before the first trial. Its bounds hold 95 % of simulated sweeps by "
            "the same scheduler, on learning curves that are made up. "
            + (
                "Seconds go by steps, a validation and a start that were timed on the machine."
                if plan.measured
                else "Seconds are arithmetic at the speed of a matrix product: start-up, and "
                "whatever is slower, comes on top."
            )
        ),
    )


def fold(title: str, table: html.Table) -> html.Block:
    """A table, folded where it is long."""
    return html.Details(title, [table]) if len(table.rows) >= FOLDED else table
