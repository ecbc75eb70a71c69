"""Advice that can be typed: every option and every script that a message or a docs page names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from project_files import project_files

from common.paths import PROJECT
from config.command_line import ELSEWHERE
from config.settings import declared_settings

CODE = [PROJECT / name for name in project_files(".py") if not name.startswith("tests/")]
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z_-]+\b")
# Options of other programs that this project starts or names.
FOREIGN = {*ELSEWHERE, "--nonsuch", "--pdeathsig", "--shm-size", "--zstd"}
STARTS_OTHERS = (  # their texts hold command lines of other programs: pip, ssh, rsync, srun, git, torchrun, DeepSpeed
    "cluster/",
    "benchmarks/",
    "records/provenance.py",
    "parallel/slurm.py",
    "launch_",
)


def texts(tree: ast.AST) -> list[str]:
    """The string constants of a module, those in f-strings too, without docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    ]


def declared_options(files: list[Path]) -> set[str]:
    """Every option that one of the files declares by `add_argument`."""
    found = {"--help", "--set"}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                found |= {word.value for word in node.args if isinstance(word, ast.Constant)}
    return found


OPTIONS = declared_options(CODE)


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(PROJECT)))
def test_every_option_and_script_that_a_text_names_exists(path):
    name = str(path.relative_to(PROJECT))
    for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
        if not name.startswith(STARTS_OTHERS):
            for option in OPTION.findall(text):
                assert option in OPTIONS | FOREIGN, f"{name}: {option} in {text!r}"
        for script in re.findall(r"(?:python |\./)([\w/]+\.(?:py|sh))\b", text):
            assert (PROJECT / script).is_file(), f"{name}: {script} in {text!r}"


def test_advice_of_the_preparation_names_the_script_of_an_option_that_train_py_lacks():
    """Its messages reach the user through prepare_dataset.py and through train.py."""
    scripts = "prepare_dataset.py", "training/arguments.py"
    shared = set.intersection(*(declared_options([PROJECT / script]) for script in scripts))
    for path in PROJECT.glob("image_data/preparation/*.py"):
        for text in texts(ast.parse(path.read_text(encoding="utf-8"))):
            for option in re.findall(r"\b(?:add|use|as|with|another) (--[a-z-]+)", text, re.IGNORECASE):
                assert option in shared or "prepare_dataset.py" in text, f"{path.name}: {option} in {text!r}"


def test_every_setting_that_a_message_names_exists():
    known = set(declared_settings())
    groups = {path.partition(".")[0] for path in known if "." in path}
    named = re.compile(rf"--set ((?:{'|'.join(groups)})\.[a-z_.]+)=")
    for path in CODE:
        for text in texts(ast.parse(Path(path).read_text(encoding="utf-8"))):
            for setting in named.findall(text):
                is_option = any(setting.startswith(f"{other}.") for other in known if other.endswith("_options"))
                assert setting in known or is_option, f"{path}: {setting}"
