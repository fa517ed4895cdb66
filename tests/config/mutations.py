"""Configs as nobody should write them: strategies for hypothesis."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import yaml
from hypothesis import strategies as st

from dra_ray import config
from dra_ray.config import fields

# every kind of config that a file may hold, as recipes write it and with every field spelt out
NAMES = config.recipe_names()

# values in YAML's own words, among them what only its grammar can say
WORDS = (
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
    "0x" + "f" * 38, "59:59:59:59:59:59:59:59:59:59:59:59:59",
    "[&b {k: v}, *b, *b]", "{x: &c [1], y: [*c, *c, *c]}", "[" * 40, "{a: " * 40,
    "&d " + "[" * 9 + "lol" + "]" * 9,
)  # fmt: skip
NAMES_OF_FIELDS = (
    "data.name", "data", "model.name", "optim.lr", "optim.epochs", "threat.eps", "kind", "paper",
    "paper.table", "space", "space.align.weight", "base", "base.optim", "select.run", "teacher",
    "pool.labels", "pool.labels.a", "pool.resources", "resources", "", ".", "..", "optim.", ".lr",
    "optim.lr.x", "description", "seed", "synthetic.images", "net.channel_mult", "optim.betas",
    "optim.betas.0", "sweep.base.data.name", "x" * 200, "align\nweight", "é", "extends",
    "constraints", "search.points", "scheduler", "__class__", "model_config", "digest",
)  # fmt: skip
EXPRESSIONS = (
    "align.weight > 0", "align.weight > 'a'", "1 / align.weight > 0", "not seed", "seed", "0 < 1",
    "__import__('os').system('x')", "seed ** seed > 1", "(lambda: seed)() > 1", "seed[0] > 1",
    "1e999 * seed > 0", "9" * 400 + " > seed", "(" * 300 + "seed > 0" + ")" * 300,
    "not " * 60 + "seed", "seed > 0 or " * 40 + "seed > 1", "0 - " * 120 + "seed > 0",
    "f'{seed}' > 0",
    "seed > b'a'", "seed > 1j", "seed > ...", "seed in [1]", "seed is None", "seed == null",
    "optim.lr * 1e308 * 10 > 1", "data.name < 'z' and optim.name > 1", "a\n> 0", "seed\x00 > 0",
    "seed > 0 # yes", "ſeed > 0", "data.name * 9 == 'a'", "seed > '" + "x" * 600 + "'",
    "null > seed", "true + seed > 0", "tracking > 0", "optim > 1", "evaluation.attacks == 1",
    "_.a.b.c > 0", "seed > -seed", "0x10 > seed", "0o8 > seed", "1_0 > seed",
    "f(" + "-" * 480 + "1) > 0", "optim > 1 and seed > 0",
)  # fmt: skip

NUMBERS = st.one_of(
    st.sampled_from(
        [0, -1, 1, 2**31, 2**53 + 1, 2**62, 2**62 + 1, 2**63, 2**64, -(2**63), 10**30, 10**39]
    ),
    st.sampled_from(
        [0.0, -0.0, 5e-324, 1e-300, 1e300, 1.7976931348623157e308, 0.1, 1 - 1e-16, 1e16]
    ),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.integers(-5, 100_001),
    st.integers(),
    st.floats(),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(WORDS + NAMES_OF_FIELDS + EXPRESSIONS),
    st.sampled_from(["x" * 9_000, "9" * 5_000, "\n" * 500, "a.b." * 5_000, "wrn-9-9", "timm/x"]),
    st.text(st.characters(categories=["Cc", "Cf", "Zl", "Zp", "Co"]), max_size=6),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(TEXTS | st.integers(), inner, max_size=3)
        | inner.map(lambda value: _nested(value, 40))
    ),
    max_leaves=6,
)


def _nested(value: Any, depth: int) -> Any:
    return value if not depth else [_nested(value, depth - 1)]


@functools.cache
def text_of(name: str) -> str:
    return (resources.files("dra_ray.recipes") / f"{name}.yaml").read_text()


@functools.cache
def spelt_out(name: str) -> str:
    return config.to_yaml(config.load(name))


@functools.cache
def tree_of(text: Callable[[str], str], name: str) -> Any:
    """A recipe's plain data, which nobody changes in place."""
    return yaml.load(text(name), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def paths(tree: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value stands in nested mappings and lists, the whole included."""
    yield prefix
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree if isinstance(tree, list) else [])
    )
    for key, value in items:
        yield from paths(value, (*prefix, key))


def _replaced(tree: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    if isinstance(tree, dict):
        return {k: _replaced(v, path[1:], new) if k == path[0] else v for k, v in tree.items()}
    if isinstance(tree, list):
        return [_replaced(v, path[1:], new) if i == path[0] else v for i, v in enumerate(tree)]
    return tree


@st.composite
def trees(draw: st.DrawFn) -> str:
    """A recipe with values, names or places changed, as YAML or JSON."""
    name = draw(st.sampled_from(NAMES))
    tree = tree_of(draw(st.sampled_from((text_of, spelt_out))), name)
    for _ in range(draw(st.integers(1, 3))):
        known = list(paths(tree))
        path = draw(st.sampled_from(known))
        old = functools.reduce(lambda t, key: t[key], path, tree)
        how = draw(st.integers(0, 9))
        if how == 0 and isinstance(old, dict):
            new: Any = {**old, draw(TEXTS): draw(VALUES)}
        elif how == 1 and isinstance(old, dict) and old:
            gone = draw(st.sampled_from(list(old)))
            new = {k: v for k, v in old.items() if k != gone}
        elif how == 2 and isinstance(old, dict) and old:
            lost = draw(st.sampled_from(list(old)))
            new = {(draw(TEXTS) if k == lost else k): v for k, v in old.items()}
        elif how == 3:
            new = draw(st.sampled_from([[old], {"a": old}, str(old), [old, old], None]))
        elif how == 4:  # another field's value
            other = draw(st.sampled_from(known))
            new = functools.reduce(lambda t, key: t[key], other, tree)
        elif how == 5 and isinstance(tree, dict) and tree.get("kind") == "sweep":
            part = draw(st.sampled_from(["constraints", "space"]))
            said = draw(st.sampled_from(EXPRESSIONS) | TEXTS)
            path = (part,)
            tree = {part: {}} | tree
            new = [said] if part == "constraints" else _space(tree.get(part), said, draw)
        else:
            new = draw(VALUES)
        tree = _replaced(tree, path, new)
    return _written(tree, draw(st.booleans()))


def _space(space: Any, said: Any, draw: st.DrawFn) -> Any:
    """The same axes and one more, which may matter under a condition."""
    field = draw(st.sampled_from([name for name, _ in fields.walk(config.Experiment)]))
    kind = draw(st.sampled_from(["choice", "uniform", "log_uniform", "integer"]))
    axis = {kind: draw(st.lists(NUMBERS, max_size=3)), "when": said}
    return {**(space if isinstance(space, dict) else {}), field: axis}


def _written(tree: Any, as_json: bool) -> str:
    if as_json:
        return json.dumps(tree, ensure_ascii=False, default=str)
    try:
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        return str(yaml.dump(tree, Dumper=dumper, allow_unicode=True))
    except (yaml.YAMLError, ValueError, TypeError):
        return json.dumps(tree, default=str)


@st.composite
def texts(draw: st.DrawFn) -> str:
    """A recipe's text with a line or a few characters changed, as by a slip of the hand."""
    text = draw(st.sampled_from((text_of, spelt_out)))(draw(st.sampled_from(NAMES)))
    for _ in range(draw(st.integers(1, 3))):
        lines = text.splitlines(keepends=True) or ["a: b\n"]
        at = draw(st.integers(0, len(lines) - 1))
        name = lines[at].partition(":")[0]
        word = draw(st.sampled_from(WORDS) | TEXTS)
        how = draw(st.integers(0, 8))
        if how == 0:
            lines[at] = f"{name}: {word}\n"
        elif how == 1:
            lines.insert(at, draw(st.sampled_from(lines)))  # given twice
        elif how == 2:
            lines[at] = draw(st.sampled_from(["\t", "  ", " "])) + lines[at]
        elif how == 3:
            del lines[at]
        elif how == 4:
            lines.insert(at, f"{draw(st.sampled_from(NAMES_OF_FIELDS))}: {word}\n")
        elif how == 5:
            lines.insert(at, f"{draw(st.sampled_from(['extends', 'kind', 'base']))}: {word}\n")
        elif how == 6:
            lines = [f"{name}: &z {word}\n", *lines, *("again: *z\n" for _ in range(2))]
        else:
            place = draw(st.integers(0, len(text)))
            rest = text[place + draw(st.integers(0, 2)) :] if how == 7 else ""
            lines = [text[:place], word if how == 7 else "", rest]
        text = "".join(lines)
    return text


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """The bytes of a damaged config's file."""
    raw = draw(texts() | trees()).encode("utf-8", "surrogatepass")
    how = draw(st.integers(0, 20))
    if how == 0:
        return raw.decode("utf-8", "replace").encode("latin-1", "replace")
    if how == 1:
        return b"\xef\xbb\xbf" + raw
    if how == 2:
        return raw.decode("utf-8", "replace").encode("utf-16")
    if how == 3:
        at = draw(st.integers(0, len(raw)))
        return raw[:at] + draw(st.binary(min_size=1, max_size=4)) + raw[at:]
    return draw(st.binary(max_size=80)) if how == 4 else raw


@functools.cache
def fields_of(kind: type[config.Frozen]) -> list[str]:
    return [name for name, _ in fields.walk(kind)]


def settings(kind: type[config.Frozen] = config.Experiment) -> st.SearchStrategy[list[str]]:
    """What may stand behind --set, mostly of fields that are there."""
    field = st.sampled_from(fields_of(kind)) | st.sampled_from(NAMES_OF_FIELDS) | TEXTS
    value = st.sampled_from(WORDS) | TEXTS | VALUES.map(_in_one_line)
    one = st.builds(lambda f, v: f"{f}={v}", field, value) | TEXTS
    return st.lists(one, max_size=3)


def _in_one_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
