"""Files and options of every kind are read, or refused in one line that says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from dra_ray import config
from dra_ray.config import Experiment, Sweep
from dra_ray.errors import ConfigError, DraError
from dra_ray.storage import Store

# what is in the file, and what the one line says; "{}" is the file's own name
FILES: dict[str, tuple[str | bytes, str]] = {
    "parent that is a number": ("extends: 5", "{}, line 1, column 1: extends=5 is not the name"),
    "parent that is a list": (
        "seed: 1\nextends: [a]",
        "{}, line 2, column 1: extends=['a'] is not",
    ),
    "parent that is not there": ("extends: none.yaml", "none.yaml' does not exist"),
    "parent of no name": ("extends: ''", "unknown recipe ''"),
    "kind that is a list": ("kind: []", "{}, line 1, column 1: unknown kind []"),
    "kind that is a mapping": ("kind: {}", "unknown kind {{}}"),
    "kind that is null": ("kind:", "unknown kind None"),
    "kind that is a number": ("kind: 5", "unknown kind 5; known: analysis, canonical, experiment"),
    "name that is a mapping": ("data: {name: {a: b}}", "data.name={{'a': 'b'}}"),
    "name that is a list": ("data: {name: [a]}", "data.name=['a']"),
    "part that is a number": ("data: 5", "data=5: takes fields of its own (name, uri"),
    "parts that are lists": ("kind: sweep\nbase: [a]", "base=['a']: takes fields of its own"),
    "experiment whose teacher is a recipe": ("teacher: digits-edm", "teacher='digits-edm': takes"),
    "part of the wrong kind": ("kind: sweep\nbase: digits-sweep\n", "base.kind='sweep'"),
    "key that is a number": ("optim:\n  5: 1", "{}, line 2, column 3: '5' is read as int"),
    "key that is true": ("on: 1", "'on' is read as bool, not as a name; put it in quotes"),
    "key that is null": ("~: 1", "'~' is read as NoneType"),
    "key that is a list": ("? [a]\n: 1", "['a'] is not a name"),
    "key that is a mapping": ("{{a: 1}: 2}", "is not a name"),
    "not a number": ("optim: {lr: .nan}", "{}, line 1, column 13: .nan is not a finite number"),
    "infinity": ("optim: {lr: -.inf}", "-.inf is not a finite number"),
    "infinity by its exponent": ("optim: {lr: 1.0e+999}", "is not a finite number"),
    "infinity as JSON has it": ('{"optim": {"lr": Infinity}}', "optim.lr='Infinity'"),
    "not a number in a space": (
        "kind: sweep\nspace: {seed: [.nan]}",
        ".nan is not a finite number",
    ),
    "date": ("seed: 2020-01-01", "seed='2020-01-01'"),
    "date that is none": ("seed: 2020-99-99", "seed='2020-99-99'"),
    "tab": ("optim:\n\tlr: 1", "{}, line 2, column 1: not valid YAML"),
    "key twice": ("seed: 1\noptim: {}\nseed: 2", "{}, line 3, column 1: 'seed' is given twice"),
    "binary": ("seed: !!binary aGk=", "{}, line 1, column 7: tag '!!binary' is not read"),
    "python": ("!!python/object/apply:os.system [true]", "is not read; write the plain value"),
    "own tag": ("seed: !mine 1", "tag '!mine' is not read"),
    "set": ("!!set {a, b}", "tag '!!set' is not read"),
    "unknown version": ("%YAML 9.9\n--- 1", "not valid YAML"),
    "two documents": ("seed: 1\n---\nseed: 2", "{}, line 2, column 1: a second document begins"),
    "nothing": ("", "{}: expected fields such as 'kind: experiment', found nothing"),
    "comments": ("# only\n", "found nothing"),
    "text": ("hello", "found str"),
    "list": ("- a", "found list"),
    "unclosed": ("seed: 1\noptim: [1,\n", "{}, line 3, column 1: not valid YAML"),
    "latin-1": (
        "seed: 1\ndescription: café".encode("latin-1"),
        "{}, line 2: byte 0xe9 is not UTF-8",
    ),
    "utf-16": ("seed: 1".encode("utf-16"), "{}, line 1: byte 0xff is not UTF-8"),
    "zeros": (b"seed: 1\n\0\0", "{}"),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not UTF-8"),
    "merge of a number": ("<<: 5", "<< takes a mapping, not 5"),
    "alias of nothing": ("seed: *a", "alias *a stands for itself or for nothing"),
    "field of a file": (
        "seed: 1\noptim:\n  epocs: 3",
        "{}, line 3, column 3: unknown field 'optim.epocs'",
    ),
    "value of a file": ("optim:\n  batch: 8\n  lr: -1", "{}, line 3, column 3: optim.lr=-1"),
    "name with a line break": ('"a\\nb": 1', "unknown field 'a\\nb'"),
    "space without fields": ("kind: sweep\nspace: 5", "space=5"),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    content, words = FILES[what]
    file = tmp_path / "mine.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DraError) as caught:
        config.load(str(file))
    message = str(caught.value)
    assert words.format(file) in message, message
    assert message.isprintable(), message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.name={a: b}", "data.name={'a': 'b'}"),
        ("data.name=[a]", "data.name=['a']"),
        ("data=5", "data=5: takes fields of its own"),
        ("=5", "write it as field=value"),
        ("optim", "write it as field=value"),
        ("optim.=5", "unknown field 'optim.'"),
        (".=5", "unknown field '.'"),
        ("optim.lr.x=5", "unknown field 'optim.lr.x'"),
        ("optim.lr=.inf", "--set optim.lr=.inf: .inf is not a finite number"),
        ("optim.lr=[1", "--set optim.lr=[1: not valid YAML"),
        ("optim.lr=1\n---\n2", "a second document"),
        ("optim.lr=\ud800", "--set optim.lr=\\ud800: not valid YAML"),
        ("seed=2020-99-99", "seed='2020-99-99'"),
        ("pool.labels={1: a}", "'1' is read as int"),
        ("pool.labels={a: 1}", "pool.labels.a=1"),
        ("paper.tables=x", "unknown field 'paper.tables'; did you mean 'table'"),
        ("paper.method=x", "paper.table is not set"),
        ("kind=sweep", "kind='sweep'"),
    ],
)
def test_an_option_is_refused_in_one_line(setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load("digits-dm-at", config.Experiment, [setting])
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("files", "start"),
    [
        ({"a": "extends: a.yaml"}, "a"),
        ({"a": "extends: b.yaml", "b": "extends: ./c.yaml", "c": "extends: a.yaml"}, "a"),
        ({"a": "kind: sweep\nbase: a.yaml"}, "a"),
        ({"a": "kind: sweep\nbase: b.yaml", "b": "extends: a.yaml"}, "a"),
        ({"a": "kind: quickstart\nsweep: b.yaml", "b": "kind: sweep\nbase: a.yaml"}, "a"),
        ({"a": "kind: quickstart\nsweep: {base: a.yaml}"}, "a"),
    ],
)
def test_files_that_lead_in_a_circle_are_refused(
    files: dict[str, str], start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"leads back to itself \(.*a.yaml.* -> .*\)"):
        config.load(f"{start}.yaml")


@pytest.mark.parametrize("source", ["a\0b.yaml", "s9://x.yaml", "github://x.yaml", "zip://x.yaml"])
def test_names_that_no_driver_takes_are_refused(source: str) -> None:
    with pytest.raises(DraError) as caught:
        config.load(source)
    assert str(caught.value).count("\n") == 0


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").mkdir()
    with pytest.raises(DraError, match=r"mine\.yaml"):
        config.load(str(tmp_path / "mine.yaml"))


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes("extends: digits-dm-at\r\ndescription: é\r\n".encode("utf-8-sig"))
    assert config.load(str(file), config.Experiment).description == "é"


def test_the_place_is_in_the_file_that_says_it(tmp_path: Path) -> None:
    parent, child = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    parent.write_text("seed: 1\noptim: {lr: -1}\n")
    child.write_text(f"extends: {parent}\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"parent.yaml, line 2, column 9: optim.lr=-1"):
        config.load(str(child))
    child.write_text(f"kind: sweep\nbase: {parent}\nspace: {{seed: [1]}}\n")
    with pytest.raises(ConfigError, match=r"parent.yaml, line 2, column 9: base.optim.lr=-1"):
        config.load(str(child))


def test_a_part_that_is_null_begins_anew_and_a_tables_keys_have_dots() -> None:
    synthesis = config.load("digits-synthesis", config.Synthesis, ["select.run=runs/x"])
    assert synthesis.select == config.Select(run="runs/x")
    sweep = config.load("digits-sweep", config.Sweep, ["space.align.weight=[0, 1]"])
    assert sweep.space["align.weight"] == [0, 1]
    assert len(sweep.space) == 3


def test_a_part_extends_a_recipe(tmp_path: Path) -> None:
    """Spelt out, by a child of a file that names it, and two levels deep: the recipe with the
    changes.
    """
    files = {
        "spelt": "kind: sweep\nbase: {extends: digits-dra, seed: 3}\nspace: {seed: [1]}",
        "named": "kind: sweep\nbase: digits-dra\nspace: {seed: [1]}",
        "child": f"extends: {tmp_path}/named.yaml\nbase: {{seed: 3}}",
        "twice": f"extends: {tmp_path}/child.yaml\nbase: {{optim: {{epochs: 5}}}}",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    plain = config.load("digits-dra", config.Experiment)
    spelt, child, twice = (
        config.load(f"{tmp_path}/{name}.yaml", config.Sweep).base
        for name in ("spelt", "child", "twice")
    )
    assert spelt == child == config.override(plain, {"seed": 3})
    assert twice == config.override(plain, {"seed": 3, "optim.epochs": 5})


@pytest.mark.parametrize("root", ["", "memory://anchored"])
def test_a_file_names_others_from_where_it_lies(root: str, tmp_path: Path) -> None:
    folder = Store(root or str(tmp_path))
    for name, text in {
        "base.yaml": "extends: digits-dra\nseed: 7",
        "deep/run.yaml": "extends: ../base.yaml\noptim: {epochs: 3}",
        "deep/sweep.yaml": "kind: sweep\nbase: {extends: ../base.yaml}\nspace: {seed: [1]}",
        "deep/named.yaml": "kind: sweep\nbase: run.yaml\nspace: {seed: [1]}",
        "child.yaml": "extends: deep/named.yaml\nbase: {optim: {batch: 20}}",
    }.items():
        (folder / name).write_text(text)
    run = config.load(f"{folder.uri}/deep/run.yaml", Experiment)
    assert (run.seed, run.optim.epochs) == (7, 3)
    assert config.load(f"{folder.uri}/deep/sweep.yaml", Sweep).base.seed == 7
    child = config.load(f"{folder.uri}/child.yaml", Sweep).base
    assert (child.seed, child.optim.epochs, child.optim.batch) == (7, 3, 20)


def test_a_part_that_extends_nothing_is_named_with_its_line(tmp_path: Path) -> None:
    for value, words in (
        ("5", "line 3, column 3: extends=5 is not the name"),
        ("none-such", "unknown recipe 'none-such'"),
    ):
        file = tmp_path / "sweep.yaml"
        file.write_text(f"kind: sweep\nbase:\n  extends: {value}\nspace: {{seed: [1]}}\n")
        with pytest.raises(ConfigError, match=words):
            config.load(str(file))
