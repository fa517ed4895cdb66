"""Whatever a file or an option says, it is a config or one line: damaged copies of every recipe."""

from __future__ import annotations

import random
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from dra_ray import config
from dra_ray.errors import DraError
from dra_ray.sweeps import spaces

NASTY = (
    "5", "-1", "0", "1.5", "true", "null", "~", "''", "[]", "{}", "[[]]", "[{}]", "{a: b}",
    "{1: 2}", "[1, 2", "{a: 1", "]", ".nan", "-.inf", "1.0e+999", "1e999", "9" * 50,
    "1000000000000",
    "2020-01-01", "2020-99-99", "!!binary aGk=", "!!python/object:os.system x", "!x y",
    "&a [*a]", "!!set {a}", "*nothing", "<<", "{<<: 5}", "{<<: {a: 1}}", "? [a]", "- a", "a: b: c",
    "|", ">",
    "0b", "0x_", "0o9", "1_000", "12:30:45", "'\\t'", '"\\ud800"', '"\\x00"', "yes",
    "on", "@", "`",
    "%", "#", "x" * 300, "digits-dra", "digits-sweep", "mine.yaml", "/", "s3://",
    "package:none", "\u2028", "\x85", "\ufeff", "é", "NaN", "Infinity", "\t", "\x07", "---",
    "...", "\n",
)  # fmt: skip
FIELDS = (
    "data.name", "data", "model.name", "optim.lr", "optim.epochs", "threat.eps", "kind", "paper",
    "paper.table", "space", "space.align.weight", "base", "base.optim", "select.run", "teacher",
    "pool.labels", "pool.labels.a", "pool.resources", "resources", "", ".", "..", "optim.", ".lr",
    "optim.lr.x", "description", "seed", "synthetic.images", "net.channel_mult", "optim.betas",
    "optim.betas.0", "sweep.base.data.name", "x" * 200, "align\nweight", "é",
)  # fmt: skip


def text_of(name: str) -> str:
    return (resources.files("dra_ray.recipes") / f"{name}.yaml").read_text()


def with_other_text(text: str, draw: random.Random) -> str:
    """A line or a few characters changed, as by a slip of the hand."""
    lines = text.splitlines(keepends=True)
    at = draw.randrange(len(lines))
    name = lines[at].partition(":")[0]
    place = draw.randrange(len(text))
    damage = draw.randrange(8)
    if damage == 0:
        lines[at] = f"{name}: {draw.choice(NASTY)}\n"
    elif damage == 1:
        lines.insert(at, draw.choice(lines))
    elif damage == 2:
        lines[at] = draw.choice(["\t", "  ", " "]) + lines[at]
    elif damage == 3:
        del lines[at]
    elif damage == 4:
        lines.insert(at, f"{draw.choice(FIELDS)}: {draw.choice(NASTY)}\n")
    elif damage == 5:
        lines.insert(at, f"{draw.choice(['extends', 'kind', 'base'])}: {draw.choice(NASTY)}\n")
    elif damage == 6:
        return text[:place] + draw.choice(NASTY) + text[place + draw.randrange(3) :]
    else:
        return text[:place]
    return "".join(lines)


def with_other_value(tree: Any, draw: random.Random) -> Any:
    """One value, or one name, changed somewhere in the tree."""
    if isinstance(tree, dict) and tree and draw.random() < 0.8:
        key = draw.choice(list(tree))
        if draw.random() < 0.2:
            new = draw.choice([str(key)[:-1], f"{key}s", 5, None, True, draw.choice(FIELDS)])
            return {new if k == key else k: value for k, value in tree.items()}
        return tree | {key: with_other_value(tree[key], draw)}
    if isinstance(tree, list) and tree and draw.random() < 0.5:
        at = draw.randrange(len(tree))
        return tree[:at] + [with_other_value(tree[at], draw)] + tree[at + 1 :]
    try:
        return yaml.safe_load(draw.choice(NASTY))
    except (yaml.YAMLError, ValueError):
        return [tree, {"a": tree}, str(tree), 10**30, -(10**30), float("inf")][draw.randrange(6)]


def damaged(name: str, draw: random.Random) -> bytes:
    text = text_of(name)
    if draw.random() < 0.4:
        tree = yaml.safe_load(text)
        for _ in range(draw.randrange(1, 3)):
            tree = with_other_value(tree, draw)
        text = yaml.safe_dump(tree, allow_unicode=True)
    else:
        for _ in range(draw.randrange(1, 3)):
            text = with_other_text(text or "a: b", draw)
    raw = text.encode("utf-8", "surrogatepass")
    encoding = draw.random()
    if encoding < 0.03:
        return raw.decode("utf-8", "replace").encode("latin-1", "replace")
    if encoding < 0.06:
        return b"\xef\xbb\xbf" + raw
    if encoding < 0.09:
        return raw.decode("utf-8", "replace").encode("utf-16")
    if encoding < 0.12:
        at = draw.randrange(len(raw) + 1)
        return raw[:at] + bytes(draw.randrange(256) for _ in range(3)) + raw[at:]
    return raw


def options(draw: random.Random) -> list[str]:
    if draw.random() < 0.6:
        return []
    settings = []
    for _ in range(draw.randrange(1, 3)):
        equals = "=" if draw.random() < 0.95 else ""
        settings.append(f"{draw.choice(FIELDS)}{equals}{draw.choice(NASTY)}")
    return settings


def outcome(source: str, settings: list[str]) -> str | None:
    """The error's line, or None where the config and every trial of it are valid."""
    try:
        settled: config.Config = config.load(source, None, settings)
        if isinstance(settled, config.Sweep):
            spaces.experiments(settled)
        if isinstance(settled, config.Quickstart):
            spaces.experiments(settled.sweep)
    except DraError as error:
        return str(error)
    return None


def try_damaged(count: int, seed: int, folder: Path) -> tuple[int, int]:
    """How many of `count` damaged configs are valid, and how many are refused."""
    draw = random.Random(seed)
    names = config.recipe_names()
    valid = 0
    for number in range(count):
        intact = draw.random() < 0.25
        name = names[number % len(names)]
        source, raw = name, b""
        if not intact:
            source, raw = str(folder / "mine.yaml"), damaged(name, draw)
            (folder / "mine.yaml").write_bytes(raw)
        settings = options(draw) or (options(draw) if intact else [])
        try:
            line = outcome(source, settings)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {number}: {source} {settings} {raw!r}") from error
        valid += line is None
        assert line is None or (line.isprintable() and 0 < len(line) < 2000), (number, line)
    return valid, count - valid


def test_fifty_damaged_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some name mine.yaml: themselves
    valid, refused = try_damaged(50, 0, tmp_path)
    assert valid
    assert refused


@pytest.mark.slow
def test_two_thousand_damaged_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    valid, refused = try_damaged(2000, 1, tmp_path)
    assert valid > 200, (valid, refused)
    assert refused > 1000, (valid, refused)
