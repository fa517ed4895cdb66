"""A run as one archive that evaluates elsewhere: config, environment, hashes of its data, weights,
verdicts and report, with a SHA-256 for every file.

The archive is a plain tar whose first member is the index. Equal files give an equal archive, byte
for byte.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from importlib import metadata

import yaml

from dra_ray import runs
from dra_ray.errors import DataError
from dra_ray.report import page
from dra_ray.report.card import CARD, model_card
from dra_ray.report.collect import collect
from dra_ray.report.summary import Summary
from dra_ray.storage import Store, open_tar, sha256, tar_content
from dra_ray.sweeps.answer import WINNER

INDEX, CONFIG, ENVIRONMENT = "index.json", "config.yaml", "environment.txt"
FORMAT = 1
ENDING = ".tar"
KEPT = (
    runs.MANIFEST,
    runs.METRICS,
    runs.RUNGS,
    runs.FIDELITY,
    runs.MODEL,
    runs.SUMMARY,
    runs.REPORT,
    WINNER,
    f"{runs.EVALUATION}/{runs.RESULT}",
    f"{runs.EVALUATION}/{runs.VERDICTS}",
)
"""Files of a run that are packed where they are there; of a sweep also those of its finalists."""
LOGS = re.compile(r"(metrics|rungs)-\d+\.jsonl")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle that was written or checked: SHA-256 by name, and that of the index itself, which
    stands for all of it.
    """

    run: str
    files: Mapping[str, str]
    digest: str


def pack(run: Store, to: Store) -> Bundle:
    """Write the bundle of a run to the file `to`. Raises `DataError` where the folder is no run or
    is not done: a bundle is final.
    """
    summary = collect(run)
    if summary.status != "done":
        raise DataError(
            f"'{run}' is {summary.status}, and a bundle is final; resume the run with the "
            "command that started it"
        )
    page.write(run)
    contents = {name: (run / name).read_bytes() for name in _names(run, summary)}
    contents |= {
        CONFIG: yaml.safe_dump(summary.config, sort_keys=False, allow_unicode=True).encode(),
        ENVIRONMENT: "".join(f"{line}\n" for line in _installed()).encode(),
        CARD: model_card(summary).encode(),
    }
    files = {name: sha256(content) for name, content in sorted(contents.items())}
    index = _index(summary.name, files)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in ({INDEX: index} | dict(sorted(contents.items()))).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    to.write_bytes(buffer.getvalue())
    return Bundle(summary.name, files, sha256(index))


def _index(name: str, files: Mapping[str, str]) -> bytes:
    return json.dumps({"format": FORMAT, "run": name, "files": files}, indent=1).encode()


def _names(run: Store, summary: Summary) -> Iterator[str]:
    """The run's own files, and those of the trials that are its finalists."""
    folders = ["", *(final.run for final in summary.finals.values())]
    for folder in dict.fromkeys(folders):
        here = run / folder if folder else run
        names = [*KEPT, *(name for name in here.names() if LOGS.fullmatch(name))]
        for name in names:
            if (here / name).exists():
                yield f"{folder}/{name}" if folder else name


def _installed() -> list[str]:
    """Every installed distribution, as a requirements file lists it."""
    found = {(d.metadata["Name"] or "").lower(): d.version for d in metadata.distributions()}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name]


def check(file: Store, to: Store | None = None) -> Bundle:
    """Compare every file of a bundle with its index; write them below `to` only if all agree.

    Raises `DataError` naming the first file that was changed, is missing or was added.
    """
    contents = _members(file)
    if INDEX not in contents:
        raise DataError(f"'{file}' is not a bundle: it has no {INDEX}; make one with `dra bundle`")
    files, name = _listed(file, contents[INDEX])
    for listed, digest in files.items():
        if listed not in contents:
            raise DataError(f"'{file}' lacks '{listed}', which its index names; fetch it again")
        if (actual := sha256(contents[listed])) != digest:
            raise DataError(
                f"'{file}': '{listed}' was changed: its SHA-256 is {actual[:12]}… and the index "
                f"says {digest[:12]}…; fetch or make the bundle again"
            )
    if added := contents.keys() - files.keys() - {INDEX}:
        raise DataError(
            f"'{file}' holds '{min(added)}', which its index does not name; fetch it again"
        )
    if to is not None:
        if to.names():
            raise DataError(f"'{to}' is not empty; give a new folder with --to")
        for listed in files:
            (to / listed).write_bytes(contents[listed])
    return Bundle(name, files, sha256(contents[INDEX]))


def _members(file: Store) -> dict[str, bytes]:
    """Plain files of the tar by name; `DataError` for one that could be written outside a
    folder.
    """
    contents: dict[str, bytes] = {}
    try:
        with open_tar(io.BytesIO(file.read_bytes())) as archive:
            for member in archive:
                parts = member.name.split("/")
                plain = member.isfile() and not member.issparse()  # a hole takes room in memory
                inside = all(parts) and ".." not in parts and "::" not in member.name
                if not plain or not inside or member.name in contents:
                    raise DataError(
                        f"'{file}' holds '{member.name}', which no bundle does; do not use it"
                    )
                contents[member.name] = tar_content(archive, member)
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as error:
        raise DataError(f"'{file}' is not a whole tar file ({error}); fetch it again") from None
    return contents


def _listed(file: Store, text: bytes) -> tuple[dict[str, str], str]:
    """SHA-256 by name and the run's name, of an index."""
    try:
        index = json.loads(text)
        files, name, form = index["files"], index["run"], index["format"]
        whole = isinstance(files, dict) and all(isinstance(d, str) for d in files.values())
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise DataError(f"'{file}': {INDEX} is damaged; fetch or make the bundle again")
    if form != FORMAT:
        raise DataError(f"'{file}' is a bundle of format {form}; this version reads {FORMAT}")
    return files, str(name)
