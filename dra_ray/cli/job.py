"""What the entry points in jobs/ share: arguments, joining the cluster, one JSON line, exit
codes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn

from dra_ray import __version__
from dra_ray.cluster import connect
from dra_ray.config import Experiment, Frozen, Sweep, load
from dra_ray.config.text import printable
from dra_ray.errors import ConfigError, DraError
from dra_ray.runs import MANIFEST, Record
from dra_ray.storage import Store, folder_name, masked
from dra_ray.submission.work import SUBMITTED_BY
from dra_ray.sweeps import spaces

Result = Record | Mapping[str, object]


def main(kind: type[Frozen] | None, call: Callable[..., Result]) -> NoReturn:
    """Run `call` on the cluster that the job belongs to; the result is one JSON line on stdout,
    progress goes to stderr.

    With a `kind`, CONFIG is read and `call(config, run, progress=...)` is called; without,
    `call(run, progress=...)`. `run` is the folder NAME in --storage. Exit codes: 0, the error's own
    (2 for what the user can mend), else 1.
    """
    arguments = _parser(kind).parse_args()
    _say_code()
    try:
        run = _folder(arguments.storage, arguments.name)
        given: list[object] = [run]
        if kind is not None:
            settings = load(arguments.config, kind, arguments.set)
            _look_at_targets(settings, run)
            given = [settings, run]
        with connect():
            # a job's stop: what is under way is given back, such as the pool; only now, since
            # joining Ray sets a handler that ends the process at once
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            result = call(*given, progress=_progress)
    except KeyboardInterrupt:
        print("error: stopped; the same job resumes it", file=sys.stderr)
        sys.exit(130)
    except DraError as error:
        print(f"error: {printable(masked(str(error)))}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(plain(result), sort_keys=True), flush=True)
    sys.exit(0)


def _say_code() -> None:
    """Which code this is, where `dra submit` sent it; warns where it is of another version."""
    submitted_by = os.environ.get(SUBMITTED_BY)
    if submitted_by is None:
        return
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    print(f"dra_ray {__version__} in '{folder}'", file=sys.stderr, flush=True)
    if submitted_by != __version__:
        print(
            f"warning: submitted by dra_ray {submitted_by}, but the cluster has {__version__}; "
            "install the same version there, or submit with --code tree",
            file=sys.stderr,
            flush=True,
        )


def _parser(kind: type[Frozen] | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    if kind is not None:
        parser.add_argument(
            "config", metavar="CONFIG", help="recipe name, or URI of a .yaml or .json file"
        )
        parser.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="change a field of the config; may be repeated",
        )
    parser.add_argument(
        "--storage",
        required=True,
        metavar="URI",
        help="folder of runs that every node can reach, such as s3://bucket/runs",
    )
    parser.add_argument(
        "--name", required=True, help="the run's folder in it; an unfinished run is resumed"
    )
    return parser


def _folder(storage: str, name: str) -> Store:
    root = Store(storage)
    if root.is_local and not storage.removeprefix("file://").startswith("/"):
        raise ConfigError(
            f"--storage '{storage}' is relative, but a job's directory is gone when it ends; give "
            "a URI such as s3://bucket/runs or a full path"
        )
    return root / folder_name(name)


def _look_at_targets(settings: Frozen, run: Store) -> None:
    """Before the first start of aligned runs: what their teachers can teach, on stderr."""
    if not isinstance(settings, Experiment | Sweep) or (run / MANIFEST).exists():
        return
    from dra_ray.inspection import diagnosis  # with torch, which the other jobs load on their own

    experiments = (
        spaces.experiments(settings).values() if isinstance(settings, Sweep) else [settings]
    )
    for line in diagnosis.told([each.with_sources() for each in experiments]):
        print(line, file=sys.stderr, flush=True)


def _progress(row: Result) -> None:
    print(json.dumps(plain(row)), file=sys.stderr, flush=True)


def plain(result: Result) -> Mapping[str, object]:
    """A record as its file holds it."""
    return result.on_disk() if isinstance(result, Record) else result
