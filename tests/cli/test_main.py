"""What a user types: bad input is one line on stderr and exit code 2, before torch and Ray are
imported.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from dra_ray import config
from dra_ray.cli.main import app, main
from dra_ray.errors import StorageError


def dra(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dra_ray", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )


def in_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same without a process of its own, whose imports would take most of the time."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    code = 0
    sys.argv = ["dra", *arguments]
    try:
        with (
            contextlib.chdir(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.mark.seconds
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_complete_in_a_shell(shell: str, tmp_path: Path) -> None:
    asked = os.environ | {
        "_DRA_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": "dra sw",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "COMP_WORDS": "dra sw",
        "COMP_CWORD": "1",
    }
    program = "import sys; sys.argv[0] = 'dra'; from dra_ray.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=asked,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "sweep" in done.stdout
    assert "train" not in done.stdout.replace("Train many", "")


def test_help_says_what_debug_does_and_debug_does_it(tmp_path: Path) -> None:
    assert "--debug" in in_process("--help", cwd=tmp_path).stdout
    assert "traceback" in in_process("--help", cwd=tmp_path).stdout
    for arguments in (["--debug", "plan", "nowhere.yaml"], ["plan", "--debug", "nowhere.yaml"]):
        with pytest.raises(StorageError, match=r"nowhere\.yaml"):
            in_process(*arguments, cwd=tmp_path)


@pytest.mark.seconds
def test_both_ways_of_calling_it_are_one(tmp_path: Path) -> None:
    for arguments in (["train", "digit-dra"], ["recipes", "--help"]):
        apart, here = dra(*arguments, cwd=tmp_path), in_process(*arguments, cwd=tmp_path)
        assert (apart.returncode, apart.stderr) == (here.returncode, here.stderr)
        # after the line with the program's name, which may be wrapped
        assert _after_usage(apart.stdout) == _after_usage(here.stdout)


def _after_usage(text: str) -> str:
    return text[text.find("List the") :]


AT = ["--address", "http://127.0.0.1:9"]  # where nobody listens


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "digit-dra"], ["unknown recipe 'digit-dra'", "did you mean 'digits-dra'"]),
        (
            ["train", "digits-dra", "--set", "optim.epoch=3"],
            ["optim.epoch", "did you mean 'epochs'"],
        ),
        (["train", "digits-dm-at", "--set", "optim.lr=-1"], ["optim.lr=-1", "greater than 0"]),
        (["train", "digits-dra"], ["teacher.uri", "dra teacher train digits-edm"]),
        (
            ["train", "digits-dm-at", "--storage", "/proc/none"],
            ["storage '/proc/none/digits-dm-at'", "permissions"],
        ),
        (
            ["train", "digits-dm-at", "--storage", "s4://bucket"],
            ["storage URI 's4://bucket", "s3://"],
        ),
        (["sweep", "digits-dra"], ["kind 'experiment'", "kind 'sweep'"]),
        (["sweep", "add", "nowhere"], ["align.weight=3", "--trials N"]),
        (["sweep", "add", "nowhere", "--trials", "9"], ["is no sweep"]),
        (["quickstart", "--set", "sweep.asha.grace_epochs=99"], ["grace_epochs=99"]),
        *(
            (
                [command, recipe, "--set", f"{field}=hyperband"],
                ["scheduler='hyperband': input should be ", "or 'none'"],
            )
            for command, recipe, field in (
                ("sweep", "digits-sweep", "scheduler"),
                ("plan", "digits-sweep", "scheduler"),
                ("config", "quickstart", "sweep.scheduler"),
            )
        ),
        (["evaluate", "nowhere"], ["'nowhere' does not exist", "--storage"]),
        (["evaluate", "runs/nowhere/"], ["'runs/nowhere/' does not exist"]),
        (["runs", "nowhere"], ["'nowhere' does not exist"]),
        # neither an emoji nor markup is made of a name
        *(
            ([command, code], [code])
            for command in ("plan", "report", "status", "runs")
            for code in (":two:", "x:+1:y", "[red]z", "[/]")
        ),
        (["compare", ":smile:", ":two:"], ["':smile:' does not exist"]),
        (["compare", "nowhere", "neither"], ["'nowhere' does not exist", "--storage"]),
        (["report", "nowhere"], ["'nowhere' does not exist", "--storage"]),
        (["bench", "evaluate", "nowhere"], ["'nowhere' does not exist"]),
        (["plan", "runs/nowhere"], ["'runs/nowhere' is no recipe", "dra recipes"]),
        *(
            (["plan", "digits-dm-at", "--tflops", speed], [f"--tflops {speed}", "between 1e-06"])
            for speed in ("0", "-1", "nan", "inf", "1e-300", "1e+300")
        ),
        (["train", "digits-dm-at", "--storage", ""], ["storage URI is empty"]),
        # what is to be written after the work is looked at before it
        *(
            ([*command, option, "/"], ["'/' is a folder; name a file in it"])
            for command, option in (
                (["train", "digits-dm-at"], "--json"),
                (["plan", "digits-dm-at"], "--json"),
                (["runs"], "--json"),
                (["compare", "one", "two"], "--json"),
                (["report", "one", "two"], "--to"),
                (["bench", "policy"], "--out"),
                (["teacher", "probe", "package:fashion-edm"], "--out"),
            )
        ),
        (
            ["train", "digits-dm-at", "--json", "/proc/version/x.json"],
            ["'/proc/version/x.json' cannot be reached or written (Not a directory)"],
        ),
        (["train", "digits-dm-at", "--json", "s4://b/x.json"], ["storage URI 's4://b/x.json'"]),
        (["train", "digits-dm-at", "--json", "s3://u:pw@b/x.json"], ["holds credentials"]),
        (["plan", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
        (
            ["synthesize", "--set", "teacher=nowhere"],
            ["no teacher at '", "nowhere' (card.json is missing)", "dra teacher train"],
        ),
        (["report", "one", "two"], ["'one' does not exist"]),
        (["bundle", "nowhere"], ["'nowhere'"]),
        (["bundle", "nowhere.tar", "--check"], ["nowhere.tar"]),
        (["export", "nowhere"], ["'nowhere'"]),
        (["export", "nowhere", "--to", "pickle"], ["--to pickle"]),
        (["train"], ["RECIPE|FILE"]),
        (["submit", "trian", "digits-dm-at", *AT], ["KIND 'trian'", "did you mean 'train'"]),
        (["submit", "train", "digits-dm-at"], ["--address is not given", "http://127.0.0.1:8265"]),
        (["submit", "train", *AT], ["RECIPE|FILE is not given"]),
        (["submit", "evaluate", *AT], ["--name is not given"]),
        (["submit", "evaluate", "digits-dm-at", *AT], ["evaluate takes no RECIPE"]),
        (["submit", "train", "digits-dm-at", *AT, "--code", "mine"], ["--code 'mine'", "tree"]),
        (["submit", "train", "digits-dra", *AT], ["teacher.uri is not set"]),
        (
            ["submit", "train", "digits-dm-at", "--address", "http://192.0.2.1:8265"],
            ["--storage 'runs'", "path of this machine", "s3://bucket/runs", "file:///mnt"],
        ),
        (["jobs", "list", "--address", "192.0.2.1:6379"], ["URL of a Ray dashboard"]),
        (["jobs", "stop", "x", "--address", "http://u:pw@192.0.2.1"], ["holds credentials"]),
        (["jobs", "list", *AT], ["no Ray dashboard answers at 'http://127.0.0.1:9'"]),
        (["synthesize", "--fast"], ["--fast"]),
        (
            ["teacher", "probe", "package:fashion-edn"],
            ["'package:fashion-edn'", "did you mean 'fashion-edm'"],
        ),
        (
            ["teacher", "probe", "package:fashion-edm", "--sigmas", "low"],
            ["--sigmas low", "commas"],
        ),
        (
            ["teacher", "import-dit", "a", "b", "c", "--to", "d", "--massive", "x"],
            ["--massive x", "commas"],
        ),
        (["bench", "step", "--device", "gpu0"], ["--device gpu0", "write cpu, or cuda"]),
        (["teacher", "probe", "package:fashion-edm", "--device", "meta"], ["--device meta"]),
        (["teacher", "quality", "nowhere", "--set", "nam=digits"], ["nam", "did you mean 'name'"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], words: list[str], tmp_path: Path
) -> None:
    done = in_process(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert list(tmp_path.iterdir()) == [], "something was written"


HOSTILE = "\x1b[2J\x1b]0;title\x07 cleared\r\n\u202etxet \ud800"


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "."],
        ["status", "one"],
        ["status", "many"],
        ["report", "one"],
        ["report", "many"],
        ["evaluate", "many"],
        ["sweep", "stop", "many", "trial-9"],
        ["plan", HOSTILE],
        ["report", HOSTILE],
    ],
)
def test_no_text_of_a_stranger_steers_the_terminal(arguments: list[str], tmp_path: Path) -> None:
    known = {"created": "2026-01-01T00:00:00+00:00", "digest": "x", "name": HOSTILE}
    known |= {"stopped": HOSTILE, "config": {"align": {"weight": HOSTILE}}, "status": "failed"}
    trials = {"trials": {HOSTILE: {"align.weight": 0.5}}, "finals": {"dra": HOSTILE}}
    row = {"trial": HOSTILE, "epoch": 1, "images_seen": 8, "decision": "failed"}
    row |= {"clean_accuracy": 0.5, "robust_accuracy": 0.25, "reason": HOSTILE, "at": 1.0}
    for folder, manifest in (("one", {"kind": "train"}), ("many", {"kind": "sweep", **trials})):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "manifest.json").write_text(json.dumps(known | manifest))
    (tmp_path / "many" / "rungs.jsonl").write_text(json.dumps(row) + "\n")
    done = in_process(*arguments, cwd=tmp_path)
    assert done.returncode in (0, 2), done.stderr
    said = done.stdout + done.stderr
    assert said
    assert all(c.isprintable() or c == "\n" for c in said), repr(said)


@pytest.mark.parametrize("command", ["runs", "status", "report", "export", "compare", "evaluate"])
def test_a_file_is_no_folder_of_a_run(command: str, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("mine")
    files = ["some.txt"] * (2 if command == "compare" else 1)
    done = in_process(command, *files, cwd=tmp_path)
    assert done.returncode == 2
    assert "some.txt' is a file; give " in done.stderr


def test_a_name_that_is_taken_by_another_config_is_refused(tmp_path: Path) -> None:
    from dra_ray import runs
    from dra_ray.storage import Store

    experiment = config.load("digits-dm-at", config.Experiment)
    runs.begin_run(
        Store(str(tmp_path / "runs" / "mine")),
        "train",
        experiment.model_dump(mode="json"),
        experiment.digest(),
    )
    done = in_process(
        "train", "digits-dm-at", "--name", "mine", "--set", "optim.lr=0.05", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "optim.lr is 0.2 there and 0.05 now" in done.stderr
    assert "--name" in done.stderr


def test_a_misspelt_run_is_answered_with_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "runs" / "digits-dra").mkdir(parents=True)
    done = in_process("evaluate", "runs/digit-dra", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "did you mean 'runs/digits-dra'?" in done.stderr


def test_a_teacher_that_is_not_there_is_found_before_ray_starts(tmp_path: Path) -> None:
    done = in_process("train", "digits-dra", "--set", "teacher.uri=nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "no teacher at" in done.stderr
    assert "nowhere' (card.json is missing)" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.seconds
def test_arguments_are_checked_without_torch_or_ray(tmp_path: Path) -> None:
    code = (
        "import sys; from dra_ray.cli.main import main; sys.argv = ['dra', 'train', 'digits-dra', "
        "'--set', "
        "'optim.epoch=3']\n"
        "try: main()\nexcept SystemExit as e: assert e.code == 2, e.code\n"
        "assert not {'torch', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_tables_are_also_json(tmp_path: Path) -> None:
    done = in_process("recipes", "--json", "recipes.json", cwd=tmp_path)
    assert done.returncode == 0
    rows = json.loads((tmp_path / "recipes.json").read_text())
    assert [row["recipe"] for row in rows] == config.recipe_names()
    assert all(row["recipe"] in done.stdout for row in rows)
    done = in_process(
        "plan", "digits-dm-at", "--tflops", "0.1", "--json", "plan.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "plan.json").read_text())


COMMANDS = [
    "quickstart",
    "train",
    "sweep",
    "evaluate",
    "compare",
    "synthesize",
    "report",
    "bundle",
    "export",
    "plan",
    "config",
    "recipes",
    "submit",
]
POOL_COMMANDS = ["up", "status", "down"]
TEACHER_COMMANDS = [
    "train",
    "import",
    "import-dit",
    "latents",
    "list",
    "probe",
    "statistics",
    "quality",
    "massive",
]


@pytest.mark.parametrize(
    "command",
    COMMANDS
    + [f"teacher {name}" for name in TEACHER_COMMANDS]
    + [f"pool {name}" for name in ("up", "status", "down")]
    + [f"jobs {name}" for name in ("list", "logs", "follow", "stop")]
    + ["dashboards up"],
)
def test_every_command_has_help(command: str, tmp_path: Path) -> None:
    done = in_process(*command.split(), "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Usage" in done.stdout
    assert len(done.stdout.splitlines()) > 5


def test_a_list_of_commands_shows_running_text() -> None:
    groups = [typer.main.get_command(app)]
    for group in groups:  # those found on the way are looked at too
        assert isinstance(group, TyperGroup)
        for command in group.commands.values():
            shown, words = command.short_help or "", (command.help or "").split()
            assert "\n" not in shown
            assert shown.split() == words[: len(shown.split())] != []
        groups += [sub for sub in group.commands.values() if isinstance(sub, TyperGroup)]
    assert len(groups) > 4


def test_the_version_is_said_with_what_numbers_depend_on(tmp_path: Path) -> None:
    said = dra("--version", cwd=tmp_path)
    assert said.returncode == 0
    assert said.stdout.startswith("dra_ray ")
    assert "torch" in said.stdout
    assert "ray" in said.stdout


def test_a_config_is_printed_as_yaml(tmp_path: Path) -> None:
    printed = in_process("config", "digits-dra", "--set", "optim.lr=0.3", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert not printed.stderr, printed.stderr
    (tmp_path / "mine.yaml").write_text(printed.stdout)
    assert config.load(str(tmp_path / "mine.yaml")) == config.load(
        "digits-dra", None, ["optim.lr=0.3"]
    )
    fields = in_process("config", "--fields", cwd=tmp_path)
    assert fields.stdout == (Path(__file__).parents[2] / "docs" / "fields.md").read_text()
    nothing = in_process("config", cwd=tmp_path)
    assert nothing.returncode == 2
    assert "RECIPE|FILE is not given" in nothing.stderr


def test_a_job_prints_records_as_their_files_hold_them() -> None:
    from dra_ray import runs
    from dra_ray.cli import job

    manifest = runs.Manifest(kind="synthetic", status="done", images=3)
    assert job.plain(manifest) == {"images": 3, "kind": "synthetic", "status": "done"}
    assert job.plain({"images": 3}) == {"images": 3}
