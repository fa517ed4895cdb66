"""What a page is made of, as records; the templates beside this file turn them into one
self-contained HTML file.

No text is put together to HTML in Python: Jinja2 escapes whatever a record holds. A page needs no
network: plotly is inside it once, if there is a plot, and pictures are data URIs.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

from dra_ray.report import plots, words

LONG = 40  # characters from which a cell may wrap


class Block:
    """A part of a page; `kind` names the macro of blocks.html.j2 that shows it."""

    kind: ClassVar[str]

    def parts(self) -> Iterable[Block]:
        """The blocks inside this one."""
        return ()


@dataclasses.dataclass(frozen=True)
class Text(Block):
    """A paragraph; `lead` is set in bold before it. A `caption` is smaller."""

    kind: ClassVar[str] = "text"
    text: str
    lead: str = ""
    caption: bool = False


@dataclasses.dataclass(frozen=True)
class Heading(Block):
    kind: ClassVar[str] = "heading"
    text: str


@dataclasses.dataclass(frozen=True)
class Bullets(Block):
    kind: ClassVar[str] = "bullets"
    items: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Terms(Block):
    """Words with their meanings."""

    kind: ClassVar[str] = "terms"
    items: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Code(Block):
    """A command to copy."""

    kind: ClassVar[str] = "code"
    text: str


@dataclasses.dataclass(frozen=True)
class Group(Block):
    """Blocks one below the other; in a `grid`, side by side where there is room; `examples` are
    narrower.
    """

    kind: ClassVar[str] = "group"
    blocks: Sequence[Block]
    style: str = ""

    def parts(self) -> Iterable[Block]:
        return self.blocks


@dataclasses.dataclass(frozen=True)
class Details(Block):
    """Blocks that a click on their title unfolds."""

    kind: ClassVar[str] = "details"
    title: str
    blocks: Sequence[Block]

    def parts(self) -> Iterable[Block]:
        return self.blocks


@dataclasses.dataclass(frozen=True)
class Plot(Block):
    """A figure (plotly as plain data, with both axes in its layout) with its title and a
    caption.
    """

    kind: ClassVar[str] = "plot"
    figure: plots.Figure
    title: str
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Picture(Block):
    """A PNG file; `name` is what a screen reader says."""

    kind: ClassVar[str] = "picture"
    png: bytes
    name: str
    caption: str = ""

    @property
    def uri(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclasses.dataclass(frozen=True)
class Pictures(Block):
    """Pictures of equal size side by side; they stay within their column however narrow."""

    kind: ClassVar[str] = "pictures"
    title: str
    pictures: Sequence[Picture]


@dataclasses.dataclass(frozen=True)
class Card:
    """A large value, what it is, and a note."""

    what: str
    value: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Cards(Block):
    kind: ClassVar[str] = "cards"
    cards: Sequence[Card]


@dataclasses.dataclass(frozen=True)
class Link:
    """A cell of a table that leads to a file beside the page."""

    text: str
    href: str


@dataclasses.dataclass(frozen=True)
class Table(Block):
    """Rows of plain values: numbers stand to the right, None is a dash. Too wide a table scrolls by
    itself.
    """

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    sortable: bool = False

    @property
    def cells(self) -> list[list[Cell]]:
        return [[cell(value) for value in row] for row in self.rows]

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """Each head, and whether numbers stand below it."""
        numeric = [
            any(shown.number is not None for shown in column)
            for column in zip(*self.cells, strict=True)
        ]
        return list(zip(self.head, numeric or [False] * len(self.head), strict=True))


@dataclasses.dataclass(frozen=True)
class Shares(Block):
    """A table of fractions in 0..1 as percent, each cell tinted by its value; the first column of
    `head` holds names.
    """

    kind: ClassVar[str] = "shares"
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]


@dataclasses.dataclass(frozen=True)
class Bars(Block):
    """(name, seconds, note) as a bar each, the longest as wide as there is room."""

    kind: ClassVar[str] = "bars"
    rows: Sequence[tuple[str, float, str]]

    @property
    def longest(self) -> float:
        return max(seconds for _, seconds, _ in self.rows) or 1.0

    @property
    def noted(self) -> bool:
        return any(note for _, _, note in self.rows)


@dataclasses.dataclass(frozen=True)
class Section(Block):
    """A headed part of the page, which its list of contents leads to."""

    kind: ClassVar[str] = "section"
    name: str
    title: str
    lead: str
    blocks: Sequence[Block]
    notice: bool = False

    def parts(self) -> Iterable[Block]:
        return self.blocks


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell as it is shown; `number` is what a column is sorted by, None for text."""

    text: str
    number: float | None = None
    href: str = ""

    @property
    def long(self) -> bool:
        return len(self.text) > LONG


def cell(value: Any) -> Cell:
    if isinstance(value, Link):
        return Cell(value.text, href=value.href)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell("–" if value is None else str(value))
    if isinstance(value, int):
        return Cell(words.count(value), value)
    return Cell(f"{value:.1f}" if abs(value) >= 10 else words.value(value), value)


# -- blocks that may be nothing --------------------------------------------------------------------
def caption(text: str) -> Text:
    return Text(text, caption=True)


def plot(figure: plots.Figure | None, title: str, text: str = "") -> Plot | None:
    return Plot(figure, title, text) if figure else None


def some(*blocks: Block | None) -> list[Block]:
    """Those that have something to show."""
    return [block for block in blocks if block is not None]


def grid(*blocks: Block | None) -> Group | None:
    """Blocks side by side; None where none has anything to show."""
    return Group(some(*blocks), "grid") if some(*blocks) else None


def section(name: str, title: str, lead: str, *blocks: Block | None) -> Section | None:
    """A section of the blocks that have something to show; None where none has."""
    return Section(name, title, lead, some(*blocks)) if some(*blocks) else None


# -- the page --------------------------------------------------------------------------------------
def page(
    title: str,
    kind: str,
    headline: str,
    sections: Iterable[Section | None],
    description: str = "",
    name: str = "",
    *,
    refresh_s: int | None = None,
) -> str:
    """A whole page of the sections that are there; `name` is its title in a browser's tab, by
    default `title`. A browser loads it anew every `refresh_s`, where that is given.
    """
    shown = [section for section in sections if section is not None]
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=title,
            name=name or title,
            kind=kind,
            headline=headline,
            description=description,
            refresh_s=refresh_s,
            sections=shown,
            contents=shown if len(shown) > CONTENTS else [],
            plotly=Markup(get_plotlyjs())
            if any(isinstance(block, Plot) for block in _all(shown))
            else "",
        )
    )


CONTENTS = 3  # sections up to which a page needs no list of them


def _all(blocks: Iterable[Block]) -> Iterator[Block]:
    for block in blocks:
        yield block
        yield from _all(block.parts())


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("dra_ray.report", ".")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_function"] = _json
    environment.filters |= {"duration": words.duration, "in_percent": words.in_percent}
    environment.globals |= {
        "show": _show,
        "page_css": Markup(loader.get_source(environment, "page.css")[0]),
        "page_js": Markup(loader.get_source(environment, "page.js")[0]),
    }
    return environment


def _show(block: Block) -> Markup:
    """A block as HTML, by the macro of its kind."""
    macros = _environment().get_template("blocks.html.j2").module
    return Markup(getattr(macros, block.kind)(block))


def _json(value: Mapping[str, Any], **options: Any) -> str:
    """What plotly reads: arrays as lists, and null for what is not a number."""
    return json.dumps(value, **{**options, "cls": PlotlyJSONEncoder})
