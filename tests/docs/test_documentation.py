"""Commands, links, file names and quoted sentences of README.md and docs/ are correct.

python -m pytest tests/docs/test_documentation.py        some seconds per page
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import torch
from documentation import ADDED, PAGES, commands, inside, make_world, treatment
from programs import clean_environment
from project_files import project_files

from benchmarks.lib.forked_programs import Program
from common.paths import PROJECT
from config.settings import resolve
from model import build_model
from models import feed_forward as feedforward
from models.cost import count_parameters
from parallel.progressive_resizing import ProgressiveResizing
from parallel.setting_checks import check_network_settings
from parallel.strategies import engine_class
from training.arguments import parse_arguments
from training.console import Console
from training.resizing_check import choose_resizing
from training.run_setup import check_settings

COMMANDS = commands()
DEFAULT_PRESETS = ("spt-lsa", "cpu", "cpu-fp32")  # of train.py without --preset, by the device


def commands_of(kind: str):
    return pytest.mark.parametrize("command", [command for command in COMMANDS if treatment(command) == kind], ids=str)


@pytest.fixture(scope="module")
def world(tmp_path_factory, shapes, unbroken) -> Path:
    return make_world(tmp_path_factory.mktemp("world") / "project", shapes, unbroken.folder)


@pytest.fixture
def new_idea(monkeypatch):
    """The feed-forward that the README adds."""
    monkeypatch.setitem(feedforward.FEED_FORWARDS, "squared_relu", feedforward.MLP)


# --- commands -----------------------------------------------------------------------------------------------------


def test_a_command_without_treatment_is_found(tmp_path):
    (tmp_path / "page.md").write_text(
        "```bash\npython train.py --epochs 1\nfrobnicate --all\nA=1 B=2 python nonsuch.py && ./run_tests.sh\n```\n"
    )
    found = commands([tmp_path / "page.md"])
    assert [str(command) for command in found] == [
        "python train.py --epochs 1",
        "frobnicate --all",
        "A=1 B=2 python nonsuch.py",
        "./run_tests.sh",
    ]
    for command, is_known in zip(found, (True, False, False, True), strict=True):
        if is_known:
            treatment(command)
        else:
            with pytest.raises(AssertionError, match="has no treatment"):
                treatment(command)


@pytest.fixture(scope="module")
def in_world(world):
    """Run a program with arguments in the project copy; equal commands only once."""
    return cache(lambda *words: Program(inside, (str(world), False, *words), {}).end())


@commands_of("run")
def test_a_quick_command_runs(command, world, in_world):
    added = ADDED.get(command.script, [])
    if command.script == "prepare_dataset.py" and not {"--archive", "--root"} & set(command.words):
        added = []  # the dataset is prepared already, so nothing is downloaded
    if command.script == "report.py" and {"--index", "--list", "--out"} & set(command.words):
        added = []  # of all runs or of several: --quick is for one
    if "squared_relu" in str(command):
        add_the_idea(world)
    done = in_world(command.script, *command.arguments, *(word for word in added if word not in command.words))
    assert done.code == 0, f"{command.page}: {command}\n{done.text}"
    assert "Traceback" not in done.text and "error: " not in done.err, done.text


def add_the_idea(world: Path) -> None:
    """Edit models/feed_forward.py of the project copy as the README describes."""
    path = world / "models/feed_forward.py"
    if "SquaredReLU" not in (source := path.read_text()):
        code = re.search(
            r"```python\n(class SquaredReLU.*?)\n\n\nFEED_FORWARDS", (PROJECT / "README.md").read_text(), re.DOTALL
        )[1]
        table = "\nFEED_FORWARDS = {\n"
        assert table in source
        path.write_text(source.replace(table, f'\n{code}\n\n{table}    "squared_relu": SquaredReLU,\n', 1))


@commands_of("train")
def test_the_arguments_and_settings_of_a_training_command_are_valid(command, monkeypatch, new_idea, world, tmp_path):
    arguments = command.arguments
    if command.words[0].startswith("./"):
        environment = {**clean_environment(), **dict(command.environment), "DRY_RUN": "1", "PYTHON": sys.executable}
        done = subprocess.run(
            [command.words[0], *arguments], cwd=world, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command.page}: {command}\n{done.stderr}"
        last = shlex.split(done.stdout.strip().splitlines()[-1])
        arguments = last[last.index(str(world / "train.py")) + 1 :]
    elif command.words[0] == "sbatch":
        script = next(i for i, word in enumerate(arguments) if word.endswith(".sbatch"))
        assert (PROJECT / arguments[script]).is_file()
        arguments = arguments[script + 1 :]
        arguments = arguments if arguments[0].startswith("--") else arguments[1:]  # the prefix of the run names
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    shutil.copy(world / "mine.py", tmp_path)  # the user-defined parts, without the copy of the project beside them
    monkeypatch.chdir(tmp_path)
    args = parse_arguments()
    for preset in [args.preset] if args.preset else DEFAULT_PRESETS:
        settings = resolve(preset, args.set, epochs=args.epochs, strategy=args.strategy)
        engine_type = engine_class(settings.strategy, peers=bool(args.host_peers or args.join))
        console = Console(out=StringIO())
        check_settings(settings, engine_type, preset, None, args.evaluate_ema_only, console)
        side = settings.image_side or (64 if settings.model.architecture.startswith("timm") else 32)
        choose_resizing(settings, args.set, engine_type.resizing_refusal, 10, side, console)
        assert not (engine_type.resizing_refusal and ProgressiveResizing(settings.resizing, settings.model.patch).is_on)
        with torch.device("meta"):
            check_network_settings(build_model(settings.model, 10, side), settings)


def test_the_two_networks_that_are_compared_by_hand_are_of_equal_size(monkeypatch):
    counts = []
    for command in [command for command in COMMANDS if command.page == "comparing.md" and "--seed" in command.words]:
        monkeypatch.setattr(sys, "argv", ["train.py", *command.arguments])
        args = parse_arguments()
        with torch.device("meta"):
            counts.append(count_parameters(build_model(resolve(args.preset, args.set).model, 100, 32)))
    assert len(counts) == 2 and counts[1] == pytest.approx(counts[0], rel=0.01)


@commands_of("parse")
def test_the_arguments_of_a_long_command_are_valid(command, world):
    done = Program(inside, (str(world), True, command.script, *command.arguments), {}).end()
    assert done.code == 0, f"{command.page}: {command}\n{done.text}"


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.words[0] == "./run_tests.sh"], ids=str)
def test_tests_and_marks_that_are_named_exist(command):
    markers = (PROJECT / "pyproject.toml").read_text()
    for before, word in itertools.pairwise(command.words):
        assert before != "-m" or f'"{word}:' in markers
        assert not word.startswith("tests/") or (PROJECT / word).exists()


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.words[0] in ("source", ".")], ids=str)
def test_a_file_that_is_sourced_exists(command):
    assert command.words[1] == ".venv/bin/activate" or (PROJECT / command.words[1]).is_file()


# --- links, files, sentences ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub creates them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(there), (
            f"{page.name} links to {target}, but {there.name} has no such heading"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for name in re.findall(r"`((?:\w[\w-]*/)*\w[\w-]*\.(?:py|sh|css))`", text):
        assert (PROJECT / name).is_file() or list(PROJECT.glob(f"*/{name}")), f"{page.name} names {name}"


def sentences() -> list[str]:
    """Return every string of our programs, without the values filled in, and the text of the shell scripts."""
    found = [(PROJECT / name).read_text(encoding="utf-8") for name in project_files(".sh")]
    for name in (name for name in project_files(".py") if not name.startswith("tests/")):
        for node in ast.walk(ast.parse((PROJECT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_quoted_in_the_troubleshooting_page_exist():
    page = (PROJECT / "docs" / "troubleshooting.md").read_text().split("\n## Known problems of similar projects")[0]
    ours, rows = sentences(), re.findall(r"^\| ([^|]*`.*?) \|", page, re.MULTILINE)
    quoted = [sentence for row in rows for sentence in re.findall(r"`([^`]+)`", row) if sentence != "python"]
    missing = [
        sentence
        for sentence in quoted
        for part in sentence.split("...")
        if len(part.strip(" ()':;")) > 3 and not any(part.strip(" ()':;") in one for one in ours)
    ]
    assert len(quoted) > 30 and not missing, missing


def test_every_command_has_a_treatment_and_most_run():
    kinds = [treatment(command) for command in COMMANDS]
    assert kinds.count("run") >= 20 and "train" in kinds
