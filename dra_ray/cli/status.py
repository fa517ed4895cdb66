"""`dra runs` and `dra status`: what runs there are, and where one of them is."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Annotated

import typer
from rich.live import Live
from rich.text import Text

from dra_ray import config
from dra_ray import runs as files
from dra_ray.cli import terminal
from dra_ray.cli.options import RunArgument, to_write
from dra_ray.inspection import listing, overview
from dra_ray.inspection.overview import Overview
from dra_ray.storage import Store, masked
from dra_ray.storage.plain_json import strict_json

COLUMNS = 80
LOOK_S, LOOK_AT_STORE_S = 3.0, 15.0
REPORT_S, REPORT_AT_STORE_S = 10, 60  # between pages; one takes a second or two
BAR = 24  # characters
DAY_S = 86400.0

JsonFile = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=to_write,
        help="Write the records to this file as JSON; - prints them.",
    ),
]


def runs(
    storage_uri: Annotated[
        str, typer.Argument(metavar="URI", help="Folder of runs: a path, s3://bucket/runs, ...")
    ] = "runs",
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIELD=VALUE",
            help="Only runs whose config has this value, such as align.weight=1; sweeps of which "
            "some trial has; may be repeated.",
        ),
    ] = None,
    status: Annotated[
        str | None, typer.Option(help="running, done, stopped, failed or unfinished.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="train, sweep, teacher, synthetic, canonical or quickstart.")
    ] = None,
    older: Annotated[
        str | None, typer.Option(metavar="AGE", help="Begun longer ago than 30m, 12h, 3d or 2w.")
    ] = None,
    newer: Annotated[
        str | None, typer.Option(metavar="AGE", help="Begun since 30m, 12h, 3d or 2w ago.")
    ] = None,
    json: JsonFile = None,
) -> None:
    """List the runs in a storage: kind, status, age, and cost where a run has recorded it."""
    chosen = listing.Filter(
        where=config.parse_settings(where or [], "--where"),
        status=status,
        kind=kind,
        older_s=listing.read_age("--older", older) if older else None,
        newer_s=listing.read_age("--newer", newer) if newer else None,
    )
    storage = Store(storage_uri)
    files.require_folder(storage, "a folder of runs")
    found = listing.runs_below(storage, chosen, time.time())
    if _write(json, [dataclasses.asdict(run) for run in found]):
        return
    rows = [
        {
            "run": run.run,
            "kind": run.kind,
            "status": run.status,
            "age": duration(run.age_s),
            "images": "" if run.images is None else f"{run.images:,}",
            "GPU hours": "" if run.gpu_hours is None else f"{run.gpu_hours:,.1f}",
        }
        for run in found
    ]
    terminal.table(rows, f"runs in {storage_uri}") if rows else terminal.err.print(
        f"no such run in '{storage_uri}'"
    )
    for run in found:
        if run.note:
            terminal.err.print(f"note: {run.run}: {run.note}")


def status(
    run: RunArgument,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show it anew every few seconds until the run ends.")
    ] = False,
    json: JsonFile = None,
) -> None:
    """Where a run, sweep, teacher or evaluation is, on one screen."""
    store = Store(run).resolved()
    files.require_folder(store)

    def look() -> Overview:
        return overview.read(store, time.time())

    first = look()
    if _write(json, dataclasses.asdict(first)):
        return
    if not follow:
        terminal.out.print("\n".join(lines(first)))
        return
    try:
        _follow(first, look, LOOK_S if store.is_local else LOOK_AT_STORE_S)
    except KeyboardInterrupt:
        raise typer.Exit from None  # the run goes on without whoever looks at it


def _follow(shown: Overview, look: Callable[[], Overview], period_s: float) -> None:
    """Show a run in place until it ends, or until its driver is gone; without a terminal, print
    what changed.
    """
    over = _is_over(shown, shown)
    with Live(_screen(shown), console=terminal.out, auto_refresh=False) as live:
        if not terminal.out.is_terminal:
            terminal.out.print("\n".join(lines(shown)))
        while not over:
            time.sleep(period_s)
            before, shown = shown, look()
            over = _is_over(before, shown)
            if terminal.out.is_terminal:
                live.update(_screen(shown), refresh=True)
            elif lines(before)[1:] != lines(shown)[1:]:
                terminal.out.print("\n".join(lines(shown)))


def follow_page(run: Store, period_s: int | None = None) -> None:
    """Write a run's report every `period_s`, for a browser that loads it anew, until the run ends;
    Ctrl-C ends this alone. Who calls it writes the last one.
    """
    from dra_ray import report

    period_s = period_s or (REPORT_S if run.is_local else REPORT_AT_STORE_S)
    shown, told = overview.read(run, time.time()), ""
    over = _is_over(shown, shown)
    try:
        while not over:
            page = report.write(run, refresh_s=period_s)
            if page.uri != told:
                terminal.err.print(f"{page} is written anew every {period_s} s; Ctrl-C ends that")
                told = page.uri
            time.sleep(period_s)
            before, shown = shown, overview.read(run, time.time())
            over = _is_over(before, shown)
    except KeyboardInterrupt:
        terminal.err.print("the run goes on; the page is as it is now")


def _is_over(before: Overview, now: Overview) -> bool:
    """Whether the run has ended, or its driver is gone since the look before."""
    return now.has_ended or (before.status == "running" and now.status == "unfinished")


def _screen(shown: Overview) -> Text:
    return Text(terminal.plain("\n".join(lines(shown))), no_wrap=True, overflow="ellipsis")


def _write(file: str | None, records: object) -> bool:
    """Whether the records were asked for as JSON."""
    if file == "-":
        typer.echo(strict_json(records, indent=2))
    elif file:
        Store(file).write_json(records)
    return file == "-"


# -- one screen ------------------------------------------------------------------------------------
def lines(shown: Overview) -> list[str]:
    """A run in lines of at most COLUMNS characters."""
    facts = [f"{shown.kind} {shown.status}"]
    if shown.age_s is not None:
        facts.append(f"begun {duration(shown.age_s)} ago")
    if shown.last_sign_s is not None:
        facts.append(f"last sign of life {duration(shown.last_sign_s)} ago")
    if shown.gpu_hours:
        facts.append(f"{shown.gpu_hours:,.1f} GPU hours")
    text = [_middle_cut(masked(shown.run)), ", ".join(facts)]
    if shown.why:
        text.append(f"  {shown.why}")
    text += _training(shown) + _teaching(shown) + _sweeping(shown) + _evaluating(shown)
    if shown.images_made is not None:
        text.append(f"  images     {shown.images_made:,}")
    for part in shown.parts:
        text += [""] + lines(part)
    if shown.status == "unfinished":
        text.append("  no driver is seen; the command that started it resumes it")
    return [line if len(line) <= COLUMNS else line[: COLUMNS - 1] + "…" for line in text]


def _training(shown: Overview) -> list[str]:
    if (now := shown.training) is None:
        return []
    text = [f"  epoch      {_progress(now.epoch, now.epochs)}"]
    if now.remaining_s is not None:
        text[0] += f"  about {duration(now.remaining_s)} left"
    if now.loss is not None:
        speed = "" if now.images_per_s is None else f", {now.images_per_s:,.0f} images/s"
        text.append(f"  loss       {now.loss:.4g}{speed}")
    if now.robust_accuracy is None:
        return [*text, "  accuracy   not validated yet"]
    return [
        *text,
        f"  accuracy   {_percent(now.clean_accuracy)} clean, {_percent(now.robust_accuracy)} "
        f"robust (best {_percent(now.best_robust_accuracy)}), after {now.images_seen:,} images",
    ]


def _teaching(shown: Overview) -> list[str]:
    if (now := shown.teaching) is None:
        return []
    text = [f"  images     {_progress(now.images_seen, now.images_total)}"]
    if now.loss is not None:
        text.append(f"  loss       {now.loss:.4g}")
    if now.validation_accuracy is not None:
        text.append(f"  accuracy   {_percent(now.validation_accuracy)} of noisy images")
    return text


def _sweeping(shown: Overview) -> list[str]:
    if (now := shown.sweeping) is None:
        return []
    counts = ", ".join(f"{count} {what}" for what, count in now.by_state.items())
    text = [f"  trials     {now.trials}: {counts}"]
    for number, rung in enumerate(now.rungs, start=1):
        best = f", best {_percent(rung.best)}" if rung.best is not None else ""
        text.append(
            f"  rung {number:<5} epoch {rung.epoch}: {rung.reached} reached it, {rung.stopped} "
            f"stopped there{best}"
        )
    if best_trial := now.best:
        fields = ", ".join(f"{field}={value}" for field, value in best_trial.fields.items())
        text += [
            f"  best       {best_trial.trial}: {_percent(best_trial.robust_accuracy)} robust, "
            f"{_percent(best_trial.clean_accuracy)} clean after epoch {best_trial.epoch}",
            *([f"             {fields}"] if fields else []),
        ]
    for part in now.spent:
        if part.limit is not None or part.what != "trials":
            text.append(f"  {part.what.replace('_', ' '):<10} {_spent(part)}")
    return text


def _spent(part: overview.Spent) -> str:
    if part.spent is None:
        return f"not recorded, of {part.limit:,.10g}"
    if part.limit is None:
        return f"{part.spent:,.10g} spent"
    return _progress(part.spent, part.limit)


def _evaluating(shown: Overview) -> list[str]:
    if (now := shown.evaluating) is None:
        return []
    if now.autoattack_accuracy is None:
        batches = ", ".join(f"{stage} {count}" for stage, count in now.batches.items())
        return [f"  AutoAttack under way; batches done: {batches}"]
    low, high = now.interval or (0.0, 1.0)
    return [
        f"  AutoAttack {_percent(now.autoattack_accuracy)} ({_percent(low)} to {_percent(high)}), "
        f"{_percent(now.clean_accuracy)} clean, {now.images:,} test images"
    ]


def _progress(done: float, total: float | None) -> str:
    if not total:
        return f"{done:,.10g}"
    share = min(1.0, done / total)
    filled = round(BAR * share)
    return f"[{'#' * filled}{'.' * (BAR - filled)}] {done:,.10g} of {total:,.10g} ({share:.0%})"


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:.1%}"


def duration(seconds: float | None) -> str:
    """Two units at most, such as "3 d 4 h"; empty for None."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes and hours < 10 else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours and days < 10 else f"{days} d"


def _middle_cut(uri: str) -> str:
    """The end of a URI says most, its start where it is."""
    if len(uri) <= COLUMNS:
        return uri
    return f"{uri[: COLUMNS // 3]}…{uri[-(COLUMNS - COLUMNS // 3 - 1) :]}"
