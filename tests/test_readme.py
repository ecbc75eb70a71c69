"""What the README says can be run and is so. Run: python -m pytest tests/test_readme.py"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import feedforward
from update_readme import README, table, update

ROOT = Path(__file__).resolve().parent.parent
TEXT = README.read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every line of the README's shell blocks, continued lines joined, comments left out, as words."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@cache
def help_of(script: str) -> str:
    return subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_names_a_script_and_flags_that_exist(words):
    script = words[1] if words[0] == "python" else {"./launch_local_train.sh": "train.py"}.get(words[0], words[0])
    assert (ROOT / script).is_file()
    flags = {word for word in words if word.startswith("--")}
    assert all(re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(script)) for flag in flags), flags


def settings_of(words: list[str]) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == "--set"]


@pytest.mark.parametrize("words", [words for words in commands() if settings_of(words)], ids=" ".join)
def test_every_setting_exists(words, monkeypatch):
    from model import build_model
    from settings import resolve

    monkeypatch.setitem(feedforward.FEED_FORWARDS, "squared_relu", feedforward.MLP)  # the one that the README adds
    preset = words[words.index("--preset") + 1] if "--preset" in words else None
    build_model(resolve(preset, settings_of(words)).model, 10, 32)


def test_the_example_of_a_feed_forward_works():
    """The class in the README is run as it stands there."""
    import torch

    code = re.search(r"```python\n(class SquaredReLU.*?)\n\n\nFEED_FORWARDS", TEXT, re.DOTALL)[1]
    scope = dict(vars(feedforward))
    exec(code, scope)
    from parts import Dimensions

    dims = Dimensions(10, 32, 4, width=16, depth=1, heads=2, head_size=8, num_prefix=0, dropout=0.0)
    assert scope["SquaredReLU"](dims, hidden=24)(torch.randn(2, 64, 16)).shape == (2, 64, 16)


def test_the_tables_are_up_to_date():
    assert update(TEXT) == TEXT, "run: python update_readme.py"


def test_a_new_entry_stands_in_the_table(monkeypatch):
    class Mine(feedforward.MLP):
        """Something new."""

    monkeypatch.setitem(feedforward.FEED_FORWARDS, "mine", Mine)
    assert "| `mine` | Something new. | `hidden=0` |" in table("feed_forward") and "| `mine` |" in update(TEXT)


def test_links_lead_to_files():
    assert all((ROOT / target).exists() for target in re.findall(r"\]\(([^)#:]+)\)", TEXT))
