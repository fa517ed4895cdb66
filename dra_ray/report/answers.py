"""A sweep's answer in plain words, with its intervals, and no more than they allow."""

from __future__ import annotations

from dra_ray.config.readers import is_read
from dra_ray.evaluation.compare import SPELLED
from dra_ray.report import words
from dra_ray.sweeps.answer import Answer
from dra_ray.sweeps.equal import Refused

SHOWN = 5  # ties named in a sentence


def paragraph(found: Answer | Refused) -> str:
    """What `dra sweep` ends with, and what the report of a sweep begins with."""
    if isinstance(found, Refused):
        return f"No answer yet: {found.reason}."
    return " ".join(part for part in _parts(found) if part)


def _parts(found: Answer) -> tuple[str, ...]:
    return _best(found), _baseline(found), _certainty(found), _attack(found)


def attack_label(name: str) -> str:
    """An attack that judges trials, for people."""
    return SPELLED.get(name, name.upper())


def _best(found: Answer) -> str:
    over = f", the mean of {len(found.repeats)} training seeds" if len(found.repeats) > 1 else ""
    clean = (
        ""
        if found.clean_accuracy is None
        else f"; {words.percent(found.clean_accuracy)} are right without an attack"
    )
    changes = {field: v for field, v in found.fields.items() if is_read(field, found.fields)}
    fields = words.fields(changes) if changes else "the base as it is"
    attack = "the attack" if found.attack == "pgd" else attack_label(found.attack)
    return (
        f"Of {words.number(found.trials, 'trial')}, {words.count(found.competitors)} "
        f"{'was' if found.competitors == 1 else 'were'} trained to the end and can be compared. "
        f"The best is {found.trial} ({fields}): after {words.count(found.images_seen)} images it "
        f"withstands {attack} on {words.percent(found.robust_accuracy)} of "
        f"{words.count(found.images)} validation images{over} (95 % interval "
        f"{words.span(found.interval)}){clean}."
    )


def _baseline(found: Answer) -> str:
    if found.fields.get("align.weight") == 0:
        return "It is trained without alignment: no trial with alignment did better."
    if found.over_baseline is None:
        return ""
    gap = found.over_baseline
    text = (
        f"That is {words.points(abs(gap.value), sign=False)} points "
        f"{'above' if gap.value >= 0 else 'below'} the best trial without alignment, "
        f"{found.baseline} (95 % interval {words.span(gap.interval, sign=True)})"
    )
    text += (
        ", more than the choice of these images explains."
        if gap.is_clear
        else ", which the choice of these images can explain: this sweep does not show that "
        "alignment helps."
    )
    if found.confounded:
        named = " and ".join(
            f"{field} ({words.value(pair[0])} against {words.value(pair[1])})"
            for field, pair in found.confounded.items()
        )
        text += f" The two also differ in {named}."
    return text


def _certainty(found: Answer) -> str:
    others = (len(found.finalists) or found.competitors) - 1
    if not others and found.competitors > 1:
        return "The others were no finalists, and PGD alone judged them."
    if not others:
        return "Nothing else was trained to the end, so it was compared with nothing."
    if not found.ties:
        return f"It is clearly ahead of {'the other' if others == 1 else f'all {others} others'}."
    names = ", ".join(found.ties[:SHOWN]) + (", …" if len(found.ties) > SHOWN else "")
    return (
        f"It cannot be told apart from {len(found.ties)} of the "
        f"{words.number(others, 'other')} ({names}). As the best of {found.competitors} its score "
        "is flattered by chance: evaluate it on test images before quoting it."
    )


def _attack(found: Answer) -> str:
    """Whose verdicts decided, where it was not the validations' PGD."""
    if found.attack == "pgd":
        return ""
    label = attack_label(found.attack)
    text = f"{label} judged {words.number(len(found.finalists), 'finalist')}, and the winner is its"
    if not found.by_pgd:
        return f"{text}."
    return (
        f"{text}: PGD and {label} disagree about their order, which is {', '.join(found.by_pgd)} "
        f"by PGD and {', '.join(found.finalists)} by {label}, best first."
    )
