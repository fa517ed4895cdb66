"""The page: complete, self-contained, safe against hostile text, and the same for the same
files.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import tomllib
import urllib.parse
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import plotly.graph_objects as go
import pytest

from dra_ray import config
from dra_ray.inspection.state import read_rungs
from dra_ray.report import html, words, write
from dra_ray.report.collect import collect
from dra_ray.report.page import figures_of
from dra_ray.storage import Store
from dra_ray.sweeps import equal
from tests.report.written_runs import write_quickstart

ROOT = Path(__file__).parents[2]
HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)> & "quotes"'


class Page(HTMLParser):
    """What a browser would see: resources, section ids, scripts, tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "action") or (name == "href" and tag != "a"):
                self.resources.append(value or "")
            elif name == "href":
                self.links.append(value or "")
            elif name == "id":
                self.ids.append(value or "")
            elif name.startswith("on"):
                self.handlers.append(name)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["script"] and self.scripts[-1] == "":
            self.scripts[-1] = data
        elif self.tags[-1:] != ["style"] and data.strip():  # templates break lines between tags
            self.text += data.strip("\n")

    def figures(self) -> list[dict]:
        return [json.loads(script) for script in self.scripts if script.startswith("{")]


def page(run: Store) -> Page:
    return Page(write(run).read_text())


def test_a_quickstart_has_every_section_and_needs_no_network(quickstart: Store) -> None:
    seen = page(quickstart)
    assert seen.ids == [
        "figures",
        "verdict",
        "examples",
        "answer",
        "axes",
        "front",
        "more",
        "health",
        "sweep",
        "training",
        "pool",
        "images",
        "evaluation",
        "ran",
        "words",
        "files",
    ]
    assert len(seen.resources) == 2
    assert all(resource.startswith("data:image/png;base64,") for resource in seen.resources)
    assert "link" not in seen.tags
    assert "iframe" not in seen.tags
    assert sum(len(script) > 1_000_000 for script in seen.scripts) == 1  # plotly, once
    summary = (quickstart / "summary.json").read_json()
    assert summary["headline"] in seen.text
    assert seen.tags.count("noscript") == 1


def test_the_page_never_offers_to_send_data_away(quickstart: Store) -> None:
    own = page(quickstart).scripts[-1]
    assert 'plotlyServerURL: ""' in own
    assert "showSendToCloud: false" in own
    assert "modeBarButtons:" in own


def test_every_figure_is_valid_plotly_with_data_and_axis_titles(quickstart: Store) -> None:
    figures = page(quickstart).figures()
    # attacks, trade-off, rungs, lambda, sigma, synthetic, training, losses, pool, teacher; and of
    # what was found: importance, parallel, three effects, the front, two fits over compute
    assert len(figures) == 18
    for figure in figures:
        go.Figure(figure)  # raises on a property that plotly does not know
        assert figure["data"]
        assert all(len(trace["x"]) == len(trace["y"]) > 0 for trace in figure["data"])
        assert figure["layout"]["xaxis"]["title"]["text"]
        assert figure["layout"]["yaxis"]["title"]["text"]
        assert figure["layout"]["legend"]["yref"] == "container"


def test_plots_show_the_numbers_of_the_summary(quickstart: Store) -> None:
    summary = collect(quickstart)
    figures = figures_of(quickstart, summary)
    points = sorted(
        (x, y)
        for trace in figures["trade-off"]["data"]
        for x, y in zip(trace["x"], trace["y"], strict=True)
    )
    assert points == sorted(
        (round(100 * trial.clean_accuracy, 1), round(100 * trial.robust_accuracy, 1))
        for trial in summary.sweep
    )
    (line, *marked) = figures["against-align.sigma"]["data"]
    reported = equal.scores(read_rungs(quickstart / "sweep"))
    aligned = {
        trial.trial: trial.fields["align.sigma"]
        for trial in summary.sweep
        if trial.fields["align.weight"] != 0
    }
    epoch = min(
        max(max(reported[name]) for name in aligned if aligned[name] == sigma)
        for sigma in set(aligned.values())
    )
    shown = {
        (sigma, reported[name][epoch]) for name, sigma in aligned.items() if epoch in reported[name]
    }
    points = {
        (float(x), y) for trace in marked for x, y in zip(trace["x"], trace["y"], strict=True)
    }
    assert points == {(sigma, round(100 * score, 1)) for sigma, score in shown}, (
        "all marks are scores after one epoch"
    )
    assert line["y"] == [max(y for x, y in points if x == float(sigma)) for sigma in line["x"]]
    bars = {trace["name"]: trace for trace in figures["attacks"]["data"]}
    assert bars["DRA"]["y"][-1] == round(100 * summary.evaluated["dra"].autoattack_accuracy, 1)
    assert all(
        earlier >= later
        for bar in bars.values()
        for earlier, later in zip(bar["y"], bar["y"][1:], strict=False)
    )
    assert len(figures["rungs"]["layout"]["shapes"]) == len(summary.asha.rungs)


def test_a_single_run_leaves_out_what_it_does_not_have(make_train: Callable[..., Store]) -> None:
    seen = page(make_train())
    assert seen.ids == [
        "figures",
        "verdict",
        "examples",
        "training",
        "evaluation",
        "ran",
        "words",
        "files",
    ]
    assert len(seen.figures()) == 3


def test_an_unfinished_run_has_no_empty_plots_and_no_plotly(tmp_path: Path) -> None:
    run = Store(str(tmp_path / "begun"))
    (run / "manifest.json").write_json(
        {"kind": "quickstart", "name": "begun", "status": "running", "config": {}}
    )
    seen = page(run)
    assert seen.ids == ["missing", "ran", "files"]
    assert seen.figures() == []
    assert max(map(len, seen.scripts)) < 10_000
    assert "sweep/manifest.json is not written yet" in seen.text


@pytest.mark.seconds
def test_hostile_text_is_shown_and_never_run(tmp_path: Path) -> None:
    run = write_quickstart(Store(str(tmp_path / "plain")), description=HOSTILE)
    harmless = page(run)
    for name in ("sweep/manifest.json", "manifest.json"):
        manifest = (run / name).read_json() | {"name": HOSTILE, "hardware": {HOSTILE: HOSTILE}}
        for fields in manifest.get("trials", {}).values():
            fields[HOSTILE] = HOSTILE
        (run / name).write_json(manifest)
    hostile = page(run)
    assert HOSTILE in hostile.text
    assert (len(hostile.scripts), hostile.tags.count("img"), hostile.handlers) == (
        len(harmless.scripts),
        harmless.tags.count("img"),
        [],
    )
    hovers = json.dumps(
        [trace.get("hovertemplate") for figure in hostile.figures() for trace in figure["data"]]
    )
    assert "&lt;script&gt;" in hovers
    assert "<script" not in hovers


def hostile_blocks() -> list[html.Block]:
    """One of every kind, with hostile text wherever it takes text."""
    picture = html.Picture(b"png", HOSTILE, HOSTILE)
    figure = {
        "data": [{"x": [1], "y": [HOSTILE], "name": HOSTILE}],
        "layout": {"title": {"text": HOSTILE}},
    }
    text = html.Text(HOSTILE, HOSTILE)
    return [
        text,
        html.caption(HOSTILE),
        html.Heading(HOSTILE),
        html.Bullets([HOSTILE]),
        html.Terms([(HOSTILE, HOSTILE)]),
        html.Code(HOSTILE),
        html.Group([text], HOSTILE),
        html.Details(HOSTILE, [text]),
        html.Plot(figure, HOSTILE, HOSTILE),
        picture,
        html.Pictures(HOSTILE, [picture]),
        html.Cards([html.Card(HOSTILE, HOSTILE, HOSTILE)]),
        html.Table([HOSTILE], [[HOSTILE], [html.Link(HOSTILE, HOSTILE)]], sortable=True),
        html.Shares([HOSTILE], [(HOSTILE, [0.5, None])]),
        html.Bars([(HOSTILE, 1.0, HOSTILE)]),
        html.Section(HOSTILE, HOSTILE, HOSTILE, [text], notice=True),
    ]


def test_a_dash_stands_where_the_numbers_of_its_column_stand() -> None:
    table = html.Table(["policy", "share"], [["fixed", 45.1], [None, None]])
    text = html.page("", "", "", [html.Section("one", "One", "", [table])])
    assert re.findall(r"<td(.*?)>(.*?)</td>", text) == [
        ("", "fixed"),
        (' class="number" data-value="45.1"', "45.1"),
        ("", "–"),
        (' class="number"', "–"),
    ]


def test_a_value_beside_its_name_is_written_as_in_a_config() -> None:
    shown = [words.beside_name(value) for value in (True, (9.0, 11.5), 1024, 0.5, None)]
    assert shown == ["true", "9, 11.5", f"1{words.THIN}024", "0.5", None]


def test_every_block_escapes_what_it_shows() -> None:
    blocks = hostile_blocks()
    kinds = {
        kind
        for kind in vars(html).values()
        if isinstance(kind, type) and issubclass(kind, html.Block)
    } - {html.Block}
    assert {type(block) for block in blocks} == kinds
    for block in blocks:
        section = html.Section("one", "One", "", [block])
        seen = Page(html.page(HOSTILE, HOSTILE, HOSTILE, [section] * 4, HOSTILE, HOSTILE))
        assert (seen.handlers, len(seen.scripts)) == (
            [],
            6 if isinstance(block, html.Plot) else 2,
        ), block.kind
        assert seen.tags.count("img") == 4 * (block.kind == "picture" or block.kind == "pictures")
        assert HOSTILE in seen.text


def test_templates_go_with_the_package() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]["dra_ray.report"]
    files = [
        path.name
        for path in (ROOT / "dra_ray/report").iterdir()
        if path.is_file() and path.suffix != ".py"
    ]
    assert files
    assert all(any(fnmatch.fnmatch(name, pattern) for pattern in patterns) for name in files)


def test_equal_files_give_equal_bytes(quickstart: Store) -> None:
    first = write(quickstart).read_bytes(), (quickstart / "summary.json").read_bytes()
    assert (write(quickstart).read_bytes(), (quickstart / "summary.json").read_bytes()) == first


def test_a_loss_that_is_not_a_number_still_draws(make_train: Callable[..., Store]) -> None:
    run = make_train()
    logged = (run / "metrics.jsonl").read_jsonl()
    (run / "metrics.jsonl").write_jsonl([*logged[:-1], logged[-1] | {"loss_clean": math.nan}])
    losses = next(
        figure
        for figure in page(run).figures()
        if "loss" in figure["layout"]["yaxis"]["title"]["text"]
    )
    assert losses["data"][0]["y"][-1] is None
    assert losses["data"][0]["y"][-2] is not None
    (run / "metrics.jsonl").write_jsonl(row | {"loss_clean": math.nan} for row in logged)
    page(run)


def test_a_summary_is_json_for_every_parser(quickstart: Store) -> None:
    """Whatever a run's files hold, and those of earlier versions, in which NaN could stand."""
    name = collect(quickstart).tree()["finals"]["dra"]["run"]
    for file, text in (
        ("sweep/rungs.jsonl", '"clean_accuracy": NaN, '),
        ("sweep/pool.jsonl", '"demand": Infinity, '),
        (f"{name}/metrics.jsonl", '"loss_align": NaN, '),
    ):
        lines = (quickstart / file).read_text().splitlines()
        key = text.split(":")[0]
        lines[-1] = re.sub(key + ": [^,]*, ", text, lines[-1])
        assert text in lines[-1]
        (quickstart / file).write_text("\n".join(lines) + "\n")
    config = (quickstart / "manifest.json").read_json()["config"] | {"odd": [math.nan, -math.inf]}
    (quickstart / "manifest.json").write_json(
        (quickstart / "manifest.json").read_json() | {"config": config}
    )
    seen = page(quickstart)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads((quickstart / "summary.json").read_text(), parse_constant=refuse)
    for script in seen.scripts:
        if script.startswith("{"):
            json.loads(script, parse_constant=refuse)


@pytest.mark.parametrize("kind", ["teacher", "synthetic"])
def test_other_kinds_of_run_have_a_report_too(quickstart: Store, kind: str) -> None:
    seen = page(quickstart / kind)
    assert "images" in seen.ids
    assert seen.resources[0].startswith("data:image/png")


def test_the_contents_and_files_are_links_that_lead_somewhere(quickstart: Store) -> None:
    seen = page(quickstart)
    inside = [link.removeprefix("#") for link in seen.links if link.startswith("#")]
    assert inside == seen.ids
    beside = [urllib.parse.unquote(link) for link in seen.links if not link.startswith("#")]
    assert len(beside) > 10
    assert all(link.startswith("./") and (Path(quickstart.uri) / link).exists() for link in beside)


def test_a_page_says_how_to_reproduce_its_run(make_train: Callable[..., Store]) -> None:
    run = make_train("solo")
    manifest, result = (
        (run / "manifest.json").read_json(),
        (run / "evaluation/autoattack.json").read_json(),
    )
    settings = config.override(config.load("digits-dm-at", config.Experiment), {"optim.lr": 1e-3})
    (run / "manifest.json").write_json(
        manifest | {"config": settings.model_dump(mode="json"), "versions": {"commit": "abc-dirty"}}
    )
    threat = {"norm": settings.threat.norm, "eps_255": 4.0}
    (run / "evaluation/autoattack.json").write_json(
        result | {"settings": settings.evaluation.model_dump(mode="json") | {"threat": threat}}
    )
    text = page(run).text
    assert "git checkout abc  # files differed from it" in text
    assert "dra train digits-dm-at --name solo-again --set optim.lr=0.001" in text
    assert f"dra evaluate {run.uri} --set threat.eps_255=4.0" in text


def test_pages_are_named_and_tell_nothing_twice(attacked: Store) -> None:
    write(attacked)
    assert (
        "<title>attacked (training run): dra_ray report</title>"
        in (attacked / "report.html").read_text()
    )
    seen = page(attacked / "evaluation")
    assert seen.text.count("pyautoattack") == 1
    assert "attacked, evaluation" in seen.text


@pytest.mark.seconds
def test_the_teachers_loss_is_drawn_and_equal_classes_are_one_sentence(quickstart: Store) -> None:
    logged = (quickstart / "teacher/metrics.jsonl").read_jsonl()
    figure = figures_of(quickstart, collect(quickstart))["teacher"]
    assert figure["data"][0]["y"] == [row["loss"] for row in logged]
    assert figure["data"][0]["x"][-1] == 200_000
    assert figures_of(quickstart / "teacher", collect(quickstart / "teacher"))["teacher"] == figure
    assert "Each of the 10 classes has 400 synthetic images." in page(quickstart).text
    name = quickstart / "synthetic/manifest.json"
    name.write_json(name.read_json() | {"counts": {"0": 399, "1": 401}})
    assert "Synthetic images per class" in page(quickstart).text
