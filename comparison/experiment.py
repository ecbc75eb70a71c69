"""A question about architectures: `experiments/<name>.toml`, read and checked before anything runs.

    question = "Is a GEGLU better than an MLP of the same size?"
    preset = "cpu"                  # settings all arms start from; below them any setting, written as in presets/
    epochs = 10                     # the budget, exactly one of: epochs, steps (of the optimiser), seconds (of training)
    seeds = 5                       # 0 to 4, the same for every arm
    hold_out = 0.1                  # the part of train that arms are compared on (the default)
    dataset = "cifar100"            # the default

    [[arms]]                        # the first arm is the one that the others are compared to
    name = "mlp"
    idea = "What everybody does."
    model.feed_forward = "mlp"
    [[arms]]
    name = "geglu"
    idea = "A gate in place of the activation."
    model.feed_forward = "geglu"

    [sizes.small]                   # overrides of the above for `--size small`; `full` in the same way
    epochs = 1
    arms.geglu.model.feed_forward_options.hidden = 43

Settings are laid over each other in the order: preset, common, size, `--set`, arm, the size's word on the arm.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import SettingsError, unknown
from config.settings import Settings, resolve

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUDGETS = ("epochs", "steps", "seconds")
OWN = ("question", "preset", "dataset", "seeds", "hold_out", "sizes", "arms", *BUDGETS)  # every other key is a setting
MAX_SEEDS = 20  # the exact test goes through 2^seeds cases
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Variant:
    """One of the things compared. `overrides` are the texts `path=value` that `train.py --set` gets."""

    name: str
    idea: str
    overrides: list[str]
    settings: Settings


@dataclass(frozen=True)
class Experiment:
    """An experiment file at one of its sizes."""

    name: str  # of the file, with the size
    question: str
    preset: str
    dataset: str
    seeds: int
    hold_out: float
    budget: str  # epochs, steps or seconds
    budget_amount: float
    variants: list[Variant]

    def tasks(self) -> list[tuple[Variant, int]]:
        """Every arm with every seed."""
        return [(arm, seed) for arm in self.variants for seed in range(self.seeds)]


def read(
    path: Path,
    size: str | None = None,
    seeds: int | None = None,
    overrides: list[str] | None = None,
    final: bool = False,
) -> Experiment:
    """Read an experiment file.

    Args:
        size: a name of its table `sizes`; None is `small` where there is one.
        seeds: in place of the file's.
        overrides: texts `path=value` for all arms.
        final: the test split will be reported, so nothing needs to be held out.

    Raises:
        SettingsError: the file cannot be used; the message names the file, and the arm where it is one arm's fault.
    """
    tree = _read_toml(path)
    name = path.stem
    sizes = tree.get("sizes", {})
    if size is None and "small" in sizes:
        size = "small"
    if size is not None and size not in sizes:
        raise SettingsError(
            f"{path.name}: "
            + (unknown("size", size, list(sizes)) if sizes else "it has no table [sizes], so --size has no meaning")
        )
    at_size = sizes.get(size, {})
    if size is not None:
        name += f"-{size}"
    for key in ("question", "sizes"):
        if key in at_size:
            raise SettingsError(f"{path.name}: [sizes.{size}] cannot have a {key} of its own")
    budget, amount = _budget(path, tree, at_size)
    facts = {"preset": "cpu", "dataset": "cifar100", "seeds": 3, "hold_out": 0.1} | _own(tree) | _own(at_size)
    if seeds is not None:
        facts["seeds"] = seeds
    _check_facts(path, facts, final)
    common = _flatten(_settings(tree)) + _flatten(_settings(at_size)) + list(overrides or [])
    preset = facts["preset"]
    if preset.endswith(".toml"):  # a file beside this one, or one given by its whole path
        preset = str((path.parent / preset).resolve())
    arms = _read_variants(path, tree.get("arms", []), at_size.get("arms", {}), preset, common)
    return Experiment(
        name,
        facts["question"],
        preset,
        facts["dataset"],
        facts["seeds"],
        float(facts["hold_out"]),
        budget,
        amount,
        arms,
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{path.name} is not valid TOML: {error}") from None


def _own(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key in OWN}


def _settings(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in OWN}


def _budget(path: Path, tree: dict[str, Any], at_size: dict[str, Any]) -> tuple[str, float]:
    """The budget's kind and amount; a size's own replaces the common one."""
    for table in (at_size, tree):
        named = [key for key in BUDGETS if key in table]
        if named:
            break
    if len(named) != 1:
        raise SettingsError(
            f"{path.name}: give exactly one budget ({', '.join(BUDGETS)}), not {' and '.join(named) or 'none'}"
        )
    kind, amount = named[0], table[named[0]]
    number = (int, float) if kind == "seconds" else int
    if isinstance(amount, bool) or not isinstance(amount, number) or amount <= 0:
        raise SettingsError(
            f"{path.name}: {kind} must be a {'number' if kind == 'seconds' else 'whole number'} above 0, not {amount!r}"
        )
    return kind, amount


def _check_facts(path: Path, facts: dict[str, Any], final: bool) -> None:
    for key, kinds in (
        ("question", str),
        ("preset", str),
        ("dataset", str),
        ("seeds", int),
        ("hold_out", (int, float)),
    ):
        if not isinstance(facts.get(key), kinds) or isinstance(facts[key], bool):
            raise SettingsError(
                f"{path.name}: {key} " + (f"cannot be {facts[key]!r}" if key in facts else "is missing")
            )
    if not 1 <= facts["seeds"] <= MAX_SEEDS:
        raise SettingsError(f"{path.name}: seeds must lie between 1 and {MAX_SEEDS}, not {facts['seeds']}")
    if not 0 <= facts["hold_out"] < 1 or (facts["hold_out"] == 0 and not final):
        raise SettingsError(
            f"{path.name}: hold_out={facts['hold_out']:g} leaves nothing to compare arms on; it must lie between 0 and 1 "
            "(0 only with --final, which reports the test split)"
        )


def _read_variants(path: Path, arms: Any, at_size: dict[str, Any], preset: str, common: list[str]) -> list[Variant]:
    if not isinstance(arms, list) or len(arms) < 2:
        raise SettingsError(f"{path.name}: a comparison needs at least two [[arms]]")
    names = [arm.get("name") for arm in arms]
    for name, count in Counter(names).items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or count > 1:
            raise SettingsError(
                f"{path.name}: every arm needs a name of its own, of letters, digits, '.', '_' and '-'; not {name!r}"
            )
    for name in at_size:
        if name not in names:
            raise SettingsError(f"{path.name}: " + unknown("arm", name, names))
    read = [_read_variant(path, arm, at_size.get(arm["name"], {}), preset, common) for arm in arms]
    for i, arm in enumerate(read):
        for other in read[:i]:
            if arm.settings == other.settings:
                raise SettingsError(f"{path.name}: the arms '{other.name}' and '{arm.name}' have the same settings")
    return read


def _read_variant(path: Path, arm: dict[str, Any], at_size: dict[str, Any], preset: str, common: list[str]) -> Variant:
    where = f"{path.name}, arm '{arm['name']}': "
    if not isinstance(arm.get("idea"), str):
        raise SettingsError(f'{where}say in one sentence what the idea is (idea = "...")')
    own = {key: value for key, value in arm.items() if key not in ("name", "idea")}
    for key in (*own, *at_size):
        if key in OWN:
            raise SettingsError(f"{where}{key} is the same for all arms; set it for the whole question")
    overrides = common + _flatten(own) + _flatten(at_size)
    try:
        return Variant(arm["name"], arm["idea"], overrides, resolve(preset, overrides))
    except SettingsError as error:
        message = str(error)
        for text in overrides:
            message = message.replace(f"--set {text}: ", "")
        raise SettingsError(where + message) from None


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """A tree of settings as texts `path=value`; names of parts come before their options, as in `settings._merge_dataclass`."""
    texts = []
    for key, value in sorted(tree.items(), key=lambda item: (item[0] != "architecture", item[0].endswith("_options"))):
        path = f"{prefix}{key}"
        texts += (
            _flatten(value, f"{path}.") if isinstance(value, dict) else [f"{path}={json.dumps(value, default=str)}"]
        )
    return texts
