"""Recipes: every preset trains, keeps its parameter budget, names its sources and has a section in docs/recipes.md.

pytest tests/docs/test_recipes.py      no GPU, under a minute
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys

import programs
import pytest
import torch

from benchmarks import recipe_costs
from common.paths import PRESETS
from config.settings import preset_names, resolve
from model import build_model
from models.cost import count_parameters
from optim.param_groups import parameter_groups
from training.arguments import parse_arguments

RECIPES = [
    "speedrun",
    "100ep",
    "300ep",
    "1500ep",
    "cifar10",
    "cifar10-fast",
    "finetune",
    "imagenet-resnet50",
    "tutorial",
    "cpu",
    "cpu-quick",
    "cpu-fp32",
]
TEXT = recipe_costs.DOCUMENT.read_text(encoding="utf-8")
# Changes that make a preset small enough for a CPU.
SMALLER = {
    **dict.fromkeys(["100ep", "300ep", "1500ep", "cifar10"], ["image_side=16", "model.depth=2"]),
    **dict.fromkeys(["speedrun", "cifar10-fast"], ["model.depth=2"]),
    "dhvt-t-2": ["image_side=16"],
    "imagenet-resnet50": ["image_side=32"],
    "finetune": ["image_side=64", "model.architecture=timm:test_vit"],
}
# Largest number of parameters in millions, and its source.
BUDGETS = {
    "300ep": (6.0, "DHVT-T/4; DHVT-T/2 has 5.8"),
    "1500ep": (6.0, "the same network for longer"),
    "100ep": (9.08, "SL-CaiT"),
    "cifar10": (4.0, "CCT-7/3x1 has 3.78"),
}


def test_the_recipes_are_presets_and_every_preset_is_planned():
    assert set(RECIPES) <= set(preset_names()) == set(recipe_costs.AIMS)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_trains(name, shapes, tmp_path):
    """Two steps through train.py, with the recipe's own augmentation, optimizer, schedule, precision and strategy."""
    smaller = [word for text in SMALLER.get(name, []) for word in ("--set", text)]
    batch = ["--set", f"train_batch_size={3 * resolve(name, []).augmentation.repeats}"]
    programs.run(
        "train.py",
        "--preset",
        name,
        "--data-dir",
        shapes,
        "--runs-dir",
        tmp_path,
        "--name",
        name,
        "--max-steps",
        2,
        "--no-report",
        *batch,
        *smaller,
    )
    (line,) = [json.loads(text) for text in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == 2 and math.isfinite(line["train_loss"]) and math.isfinite(line["test_loss"])
    ran, asked = json.loads((tmp_path / name / "run.json").read_text())["settings"], resolve(name, []).as_dict()
    for group in ("augmentation", "schedule", "loss"):
        assert ran[group] == asked[group]
    assert ran["strategy"] == asked["strategy"] and ran["engine"]["optimizer"] == asked["engine"]["optimizer"]


@pytest.mark.parametrize("name", BUDGETS)
def test_parameters_stay_within_the_budget(name):
    most, whose = BUDGETS[name]
    with torch.device("meta"):
        model = build_model(resolve(name, []).model, 100, 32)
    assert count_parameters(model) <= most * 1e6, whose


def test_muon_trains_the_inner_convolutions_of_the_stem():
    settings = resolve("speedrun", [])
    with torch.device("meta"):
        model = build_model(settings.model, 100, 32)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1.0, 0.1, find_hidden=True)
    of_stem = {
        names[id(p)]: group["hidden"]
        for group in groups
        for p in group["params"]
        if names[id(p)].startswith("0.") and p.ndim == 4
    }
    assert len(of_stem) == 7 and [name for name, hidden in of_stem.items() if not hidden] == [
        "0.patches.steps.0.weight"
    ]


def test_the_long_recipe_is_the_middle_one_for_longer():
    assert resolve("1500ep", []).epochs == 5 * resolve("300ep", []).epochs
    assert resolve("1500ep", ["model.drop_path=0.1"]).model == resolve("300ep", []).model
    assert resolve("cifar10-fast", []).model == resolve("speedrun", []).model


@pytest.mark.parametrize("name", preset_names())
def test_every_number_has_a_source(name):
    """A comment beside it, or one in the head of the file for all without."""
    head, _, body = (PRESETS / f"{name}.toml").read_text(encoding="utf-8").partition("\nepochs")
    bare = [
        line
        for line in f"epochs{body}".splitlines()
        if "#" not in line and re.search(r"= .*\d", re.sub(r'"[^"]*"', "", line))
    ]
    assert not bare or re.search(r"Numbers without a (source|comment) are", head), f"without a source: {bare}"


def test_the_command_in_a_preset_is_its_own():
    for name in RECIPES:
        commands = re.findall(
            r"^#   (?:python train.py|./launch_local_train.sh) (.*)$",
            (PRESETS / f"{name}.toml").read_text(),
            re.MULTILINE,
        )
        assert commands and all(command.startswith(f"--preset {name}") for command in commands), name


# --- docs/recipes.md ------------------------------------------------------------------------------------------------


def test_the_plan_in_the_document_is_up_to_date():
    assert recipe_costs.update(TEXT) == TEXT, "run: python benchmarks/recipe_costs.py --update"


def test_the_plan_follows_from_its_numbers():
    of_300, of_1500 = recipe_costs.plan("300ep"), recipe_costs.plan("1500ep")
    assert of_300.steps == 300 * (50_000 // 512) and of_1500.petaflop == pytest.approx(5 * of_300.petaflop)
    assert of_300.petaflop * 1e15 == pytest.approx(3 * of_300.flops * 300 * 49_664)
    assert recipe_costs.plan("300ep", peak=2 * recipe_costs.PEAK).seconds == pytest.approx(of_300.seconds / 2)
    assert recipe_costs.plan("tutorial").seconds is None
    assert [recipe_costs.duration(s) for s in (41.4, 600, 2 * 3600)] == ["41 s", "10 min", "2.0 h"]


def test_every_recipe_has_a_section_with_its_command(monkeypatch):
    sections = dict(re.findall(r"^## `([\w-]+)`.*?\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
    assert set(RECIPES) <= set(sections)
    for name in RECIPES:
        lines = [
            line
            for block in re.findall(r"```bash\n(.*?)```", sections[name], re.DOTALL)
            for line in block.replace("\\\n", " ").splitlines()
        ]
        commands = [re.sub(r"^\w+=\S+ ", "", line) for line in lines]
        commands = [
            shlex.split(line, comments=True)
            for line in commands
            if re.match(r"\./launch_local_train\.sh|python train\.py", line)
        ]
        assert any(f"--preset {name}" in " ".join(command) for command in commands), name
        for command in commands:
            monkeypatch.setattr(sys, "argv", ["train.py", *command[1 + command[0].startswith("python") :]])
            arguments = parse_arguments()
            resolve(arguments.preset, arguments.set)
