"""An unknown field is answered with the nearest of all; docs/fields.md and `dra config` say what
is there.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from dra_ray import config
from dra_ray.config.fields import _USUAL, nested, suggest, walk
from dra_ray.config.reference import reference
from dra_ray.errors import ConfigError
from dra_ray.sweeps import spaces

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    ("kind", "field", "words"),
    [
        ("experiment", "threat.eps", "did you mean 'eps_255'?"),
        ("experiment", "eps", "did you mean 'threat.eps_255'?"),
        ("experiment", "threat.epsilon", "did you mean 'threat.eps_255' (epsilon, the radius"),
        ("experiment", "optim.label_smoothing", "did you mean 'loss.label_smoothing'?"),
        ("experiment", "lr", "did you mean 'optim.lr'?"),
        ("experiment", "optim.learning_rate", "did you mean 'optim.lr' (learning rate"),
        ("experiment", "model.width", "did you mean 'model.name' (wrn-DEPTH-WIDTH"),
        ("experiment", "model.depth", "did you mean 'model.name' (wrn-DEPTH-WIDTH"),
        ("experiment", "optim.epoch", "did you mean 'epochs'?"),
        ("experiment", "optm.epochs", "did you mean 'optim.epochs'?"),
        ("experiment", "optm", "did you mean 'optim'?"),
        ("experiment", "num_epochs", "did you mean 'optim.epochs'?"),
        ("experiment", "batch_size", "did you mean 'optim.batch' or 'evaluation.batch'?"),
        ("experiment", "lambda", "did you mean 'align.weight' (lambda"),
        ("experiment", "trades.beta", "did you mean 'loss.beta'?"),
        ("experiment", "dataset", "did you mean 'data.name'?"),
        ("experiment", "data.dataset", "did you mean 'data.name'?"),
        ("experiment", "data.path", "did you mean 'data.uri'?"),
        ("experiment", "teacher.model", "did you mean 'teacher.uri'?"),
        ("experiment", "model.arch", "did you mean 'model.name'?"),
        ("experiment", "Backbone", "did you mean 'model.name'?"),
        ("experiment", "weight-decay", "did you mean 'optim.weight_decay'?"),
        ("experiment", "align.timestep", "did you mean 'align.sigma'?"),
        ("experiment", "output_dir", "give it with the option --storage"),
        ("sweep", "num_samples", "did you mean 'trials'?"),
        ("sweep", "base.dataset", "did you mean 'base.data.name'?"),
        ("sweep", "asha.eta", "did you mean 'asha.reduction_factor'?"),
        ("quickstart", "grace_period", "did you mean 'sweep.asha.grace_epochs'?"),
        ("experiment", "model.nonsense", "known: layer, mean, name"),
        ("experiment", "optim.lr.x", "known: "),
        ("experiment", "x" * 10_000, "known: "),
        ("sweep", "optim.lr", "did you mean 'base.optim.lr'?"),
        ("sweep", "lr", "did you mean 'base.optim.lr'?"),
        ("quickstart", "optim.lr", "did you mean 'sweep.base.optim.lr'?"),
        ("synthesis", "select.runs", "did you mean 'run'?"),
    ],
)
def test_an_unknown_field_gets_the_nearest_of_all(kind: str, field: str, words: str) -> None:
    assert suggest(config.KINDS[kind], field.split(".")).startswith(words)


@pytest.mark.parametrize("setting", ["threat.eps", "optim.label_smoothing", "lr", "model.width"])
def test_options_files_and_spaces_get_the_same_answer(setting: str, tmp_path: Path) -> None:
    remedy = suggest(config.Experiment, setting.split("."))
    with pytest.raises(ConfigError) as option:
        config.load("digits-dm-at", config.Experiment, [f"{setting}=1"])
    file = tmp_path / "mine.yaml"
    folder, _, leaf = setting.rpartition(".")
    file.write_text(f"{folder}:\n  {leaf}: 1\n" if folder else f"{leaf}: 1\n")
    with pytest.raises(ConfigError) as text:
        config.load(str(file))
    with pytest.raises(ConfigError) as space:
        spaces.experiments(config.load("digits-sweep", config.Sweep, [f"space={{{setting}: [1]}}"]))
    assert all(str(caught.value).endswith(remedy) for caught in (option, text, space))


@pytest.mark.parametrize("field", [name for name, _ in walk(config.Experiment)])
def test_a_field_without_its_last_letter_is_recognised(field: str) -> None:
    if len(field.rpartition(".")[2]) > 4:
        remedy = suggest(config.Experiment, field[:-1].split("."))
        assert remedy.startswith("did you mean")
        assert field.rpartition(".")[2] in remedy


def test_what_others_call_a_field_leads_to_one() -> None:
    known = {name for kind in config.KINDS.values() for name, _ in walk(kind)}
    for field in _USUAL:
        assert any(name == field or name.endswith(f".{field}") for name in known), field


def test_every_field_says_what_it_is() -> None:
    for kind in config.KINDS.values():
        for name, field in walk(kind):
            part = nested(field)
            assert field.description or name.endswith("kind") or (part and part.__doc__), name


def test_the_page_of_fields_is_current() -> None:
    """`python -m dra_ray.config.reference > docs/fields.md` where it is not."""
    page = (DOCS / "fields.md").read_text()
    assert page == reference()
    for field in ("lr", "eps_255", "space", "channel_mult", "churn", "grace_epochs"):
        assert f"| `{field}` |" in page
    headings = [line.lstrip("# ") for line in page.splitlines() if line.startswith("#")]
    anchors = [heading.lower().replace(":", "").replace(" ", "-") for heading in headings]
    links = {part.partition(")")[0] for part in page.split("](#")[1:]}
    assert links <= set(anchors)
    assert len(set(anchors)) == len(anchors)


@pytest.mark.parametrize("name", config.recipe_names())
def test_a_printed_config_is_the_same_config(name: str, tmp_path: Path) -> None:
    settled: config.Config = config.load(name)
    file = tmp_path / "mine.yaml"
    file.write_text(config.to_yaml(settled))
    assert config.load(str(file), type(settled)) == settled


def test_odd_text_and_long_lists_survive_printing(tmp_path: Path) -> None:
    sweep = config.validate(
        config.Sweep,
        {
            "description": "on: [\u2028 '1e5' 2020-01-01 \x07 é \ud7ff",
            "base": {
                "data": {"name": "folder", "uri": "012", "resolution": 8},
                "pool": {"labels": {"<<": "yes", "1": "2020-01-01", "=": "~", "a.b/c": "1e5"}},
            },
            "space": {"seed": list(range(9_000)), "optim.lr": [1e-05]},
        },
        "test",
    )
    file = tmp_path / "mine.yaml"
    file.write_text(config.to_yaml(sweep))
    assert config.load(str(file), config.Sweep) == sweep
