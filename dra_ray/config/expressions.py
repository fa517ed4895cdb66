"""Conditions and constraints of a sweep: comparisons of config fields, as text.

`"align.weight > 0"`, `"synthetic.images <= 1000 * optim.epochs and optim.batch >= 64"`. The text is
parsed, never run: what it may hold is the list in `ALLOWED`, and everything else is refused.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from dra_ray.config.text import refusal, shown

ALLOWED = "field names, numbers, quoted text, + - * /, comparisons, and, or, not, brackets"
CHARACTERS, DEPTH = 500, 40  # of one expression

_ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS: Mapping[type, Callable[[Any], Any]] = {ast.USub: operator.neg, ast.UAdd: operator.pos}
_COMPARISONS: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_WORDS = {"true": True, "false": False, "null": None}  # as YAML writes them


@dataclasses.dataclass(frozen=True)
class Expression:
    """A condition on the fields of a config, such as `align.weight > 0`; `of` reads one."""

    text: str
    fields: frozenset[str]
    tree: ast.expr = dataclasses.field(compare=False, repr=False)

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether it is true of dotted field -> value. Raises `ConfigError` where it cannot be
        computed: text compared with a number, a division by zero, a field without a value.
        """
        try:
            return bool(_value(self.tree, values))
        except KeyError as error:
            raise refusal(
                f"{shown(self.text)} cannot be computed: {shown(error.args[0])} has no value of "
                "its own; name one of its fields"
            ) from None
        except (TypeError, ZeroDivisionError, OverflowError) as error:
            fields = ", ".join(f"{field}={shown(values[field])}" for field in sorted(self.fields))
            raise refusal(
                f"{shown(self.text)} cannot be computed for {fields} ({error}); compare numbers "
                "with numbers and text with text"
            ) from None

    def violation(self, values: Mapping[str, Any]) -> float:
        """How far it is from being true: 0 where it holds, above 0 where it does not.

        For one comparison of two numbers the distance between them, otherwise 1.
        """
        if self.holds(values):
            return 0.0
        tree = self.tree
        if isinstance(tree, ast.Compare) and len(tree.ops) == 1:
            sides = _value(tree.left, values), _value(tree.comparators[0], values)
            if all(isinstance(side, int | float) for side in sides):
                # a strict comparison of two equal numbers is violated, if by nothing
                return _distance(*sides) or 1.0
        return 1.0


def _distance(one: float, other: float) -> float:
    """Between two numbers; 1 where no float holds it."""
    try:
        distance = abs(float(one) - float(other))
    except OverflowError:
        return 1.0
    return distance if math.isfinite(distance) else 1.0


@functools.lru_cache(maxsize=1024)
def of(text: str) -> Expression:
    """The expression in `text`. Raises `ValueError` naming it and what may stand in one."""
    if len(text) > CHARACTERS:
        raise ValueError(f"{shown(text)} has more than {CHARACTERS} characters; write it shorter")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refused(text, "is not an expression") from None
    fields: set[str] = set()
    _check(tree, text, fields, DEPTH)
    negated = isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not)
    if not negated and not isinstance(tree, ast.Compare | ast.BoolOp):
        raise _refused(text, "is neither true nor false; compare something")
    if not fields:
        raise _refused(text, "names no field")
    return Expression(text, frozenset(fields), tree)


def _written(node: ast.expr, text: str) -> str:
    """As it stands in the text; `ast.unparse` would go down any depth."""
    return shown(ast.get_source_segment(text.strip(), node) or "")


def _refused(text: str, problem: str) -> ValueError:
    return ValueError(f"{shown(text)} {problem}; allowed are {ALLOWED}")


def _check(node: ast.expr, text: str, fields: set[str], depth: int) -> None:
    """Refuse what is not on the list; collect the names of fields."""
    if not depth:
        raise _refused(text, f"is nested more than {DEPTH} deep")
    parts: list[ast.expr] = []
    if isinstance(node, ast.Name | ast.Attribute):
        name = _name(node)
        if name is None:
            raise _refused(text, f"holds {_written(node, text)}")
        if name not in _WORDS:
            fields.add(name)
    elif isinstance(node, ast.Constant):
        if not isinstance(node.value, int | float | str | None):
            raise _refused(text, f"holds {_written(node, text)}")
    elif isinstance(node, ast.BoolOp):
        parts = node.values
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.UAdd):
        parts = [node.operand]
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        parts = [node.left, node.right]
    elif isinstance(node, ast.Compare) and all(type(op) in _COMPARISONS for op in node.ops):
        parts = [node.left, *node.comparators]
    else:
        raise _refused(text, f"holds {_written(node, text)}")
    for part in parts:
        _check(part, text, fields, depth - 1)


def _name(node: ast.expr) -> str | None:
    """`a.b.c` of a name with attributes, None of an attribute of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        home = _name(node.value)
        return None if home is None else f"{home}.{node.attr}"
    return None


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """The value of a node that `_check` let through."""
    if isinstance(node, ast.Name | ast.Attribute):
        name = str(_name(node))
        return _WORDS[name] if name in _WORDS else values[name]
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.BoolOp):
        every = all if isinstance(node.op, ast.And) else any
        return every(_value(part, values) for part in node.values)
    if isinstance(node, ast.UnaryOp):
        operand = _value(node.operand, values)
        return not operand if isinstance(node.op, ast.Not) else _SIGNS[type(node.op)](operand)
    if isinstance(node, ast.BinOp):
        sides = _value(node.left, values), _value(node.right, values)
        if any(isinstance(side, str) for side in sides):
            raise TypeError("arithmetic on text")
        if any(isinstance(side, list | dict) for side in sides):  # [x] * 10**9 fills the memory
            raise TypeError("arithmetic on a list")
        return _ARITHMETIC[type(node.op)](*sides)
    assert isinstance(node, ast.Compare)
    left = _value(node.left, values)
    for op, comparator in zip(node.ops, node.comparators, strict=True):
        right = _value(comparator, values)
        if not _COMPARISONS[type(op)](left, right):
            return False
        left = right
    return True
