"""Whatever a file or an option says, it is a config or one line: damaged copies of every recipe."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from dra_ray import config
from dra_ray.cli import main
from dra_ray.cli.options import data_settings, warn_of_unread
from dra_ray.errors import ConfigError, DraError
from dra_ray.sweeps import spaces
from tests.config import mutations

SECONDS = 10  # of processor time for one config; the slowest take one
KINDS = (*config.KINDS.values(), config.Conversion)


def examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same `count` examples in every run, without a folder of former ones."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,  # a clock on the wall says nothing on a busy machine
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def folder() -> Any:
    """Where mine.yaml is looked for, which some configs name: themselves."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        yield Path(place)
        os.chdir(before)


def line_of(error: DraError) -> str:
    """Of a user's mistake: one printable line that a terminal has room for."""
    line = str(error)
    assert error.exit_code == ConfigError.exit_code, repr(error)
    assert line.isprintable(), line
    assert 0 < len(line) < 2000, line
    line.encode()
    return line


def hold(read: Callable[[], config.Frozen]) -> config.Frozen | None:
    """`read` gives a config that prints and comes back equal, or raises one line, soon."""
    start = time.process_time()
    try:
        settled = read()
    except DraError as error:
        event("refused")
        line_of(error)
        return None
    else:
        event("valid")
    finally:
        assert time.process_time() - start < SECONDS
    return settled


def same(settled: config.Frozen, place: Path) -> None:
    """What the config printer prints is read again as an equal config."""
    text = config.to_yaml(settled)
    (place / "printed.yaml").write_text(text, encoding="utf-8")
    again = config.load(str(place / "printed.yaml"), type(settled))
    assert again == settled
    assert again.digest() == settled.digest()
    assert config.to_yaml(again) == text


def try_file(raw: bytes, changes: list[str]) -> bool:
    """Whether it is a config."""
    place = Path.cwd()
    (place / "mine.yaml").write_bytes(raw)
    settled: Any = hold(lambda: config.load(str(place / "mine.yaml"), None, changes))
    if settled is None:
        return False
    same(settled, place)
    sweep = settled.sweep if isinstance(settled, config.Quickstart) else settled
    if isinstance(sweep, config.Sweep):
        try:
            spaces.experiments(sweep)
        except DraError as error:
            line_of(error)
    return True


def some_settings() -> st.SearchStrategy[list[str]]:
    return st.just([]) | st.sampled_from(KINDS).flatmap(mutations.settings)


def hold_files(count: int) -> None:
    """Of `count` damaged files, and of those that are configs all the same there are some."""
    seen: Counter[bool] = Counter()

    @examples(count)
    @given(mutations.files(), some_settings())
    def each(raw: bytes, changes: list[str]) -> None:
        seen[try_file(raw, changes)] += 1

    each()
    assert seen[True] > count // 40, seen  # about a twentieth
    assert seen[False] > count // 4, seen


def test_damaged_configs() -> None:
    hold_files(150)


@pytest.mark.slow
def test_two_thousand_damaged_configs() -> None:
    hold_files(2000)


# -- options of commands that take fields alone ----------------------------------------------------
def try_settings(kind: type[config.Frozen], changes: list[str]) -> None:
    """Conversions and the data of a command have no file, but fields."""
    start: dict[str, Any] = {"source": "a"} if kind is config.Conversion else {}
    if kind is config.Data:
        hold(lambda: data_settings(changes))
        return
    whole = config.validate(kind, start, "test")
    settled: Any = hold(lambda: config.override(whole, config.parse_settings(changes)))
    if settled is not None:
        assert config.validate(kind, settled.model_dump(mode="json"), "again") == settled
    if isinstance(settled, config.Experiment):
        warn_of_unread(settled, changes)


FIELDS_ALONE = (config.Conversion, config.Data, config.Evaluation, config.Experiment)


@examples(100)
@given(st.data())
def test_settings_alone(draw: st.DataObject) -> None:
    kind = draw.draw(st.sampled_from(FIELDS_ALONE))
    try_settings(kind, draw.draw(mutations.settings(kind)))


@pytest.mark.slow
@examples(1000)
@given(st.data())
def test_a_thousand_settings_alone(draw: st.DataObject) -> None:
    kind = draw.draw(st.sampled_from(FIELDS_ALONE))
    try_settings(kind, draw.draw(mutations.settings(kind)))


# -- commands --------------------------------------------------------------------------------------
def try_command(command: str, raw: bytes, changes: list[str]) -> None:
    """A command ends with its result, or with an error that the entry point prints as one line."""
    mine = Path.cwd() / "mine.yaml"
    mine.write_bytes(raw)
    options = [part for change in changes for part in ("--set", change)]
    more = ["--tflops", "1"] if command == "plan" else []  # else it measures this machine
    ended = CliRunner().invoke(
        main.app, [command, str(mine), *more, *options], standalone_mode=False
    )
    error = ended.exception
    if error is None:
        event(f"{command}: done")
        assert ended.exit_code == 0
        return
    event(f"{command}: refused")
    if isinstance(error, DraError):
        line_of(error)
    else:  # click's own, of an argument that no option takes
        assert hasattr(error, "format_message"), repr(error)
    assert "Traceback" not in ended.output


COMMANDS = st.sampled_from(["config", "config", "plan"])


@examples(40)
@given(COMMANDS, mutations.files(), some_settings())
def test_commands_on_damaged_configs(command: str, raw: bytes, changes: list[str]) -> None:
    try_command(command, raw, changes)


@pytest.mark.slow
@examples(400)
@given(COMMANDS, mutations.files(), some_settings())
def test_four_hundred_commands(command: str, raw: bytes, changes: list[str]) -> None:
    try_command(command, raw, changes)
