"""An experiment: a file `experiments/<name>.toml`, read and checked before anything runs.

    question = "Is a GEGLU better than an MLP of the same size?"
    preset = "cpu"                  # settings that all variants start from
    epochs = 10                     # the budget, exactly one of: epochs, steps (optimizer steps), seconds (of training)
    seeds = 6                       # seeds 0 to 5 for every variant
    hold_out = 0.1                  # share of train in the validation split, on which variants are compared (default)
    dataset = "cifar100"            # default
    match = "parameters"            # or "flops": resize `hidden` of each variant to the first variant's cost within 1 %
    margin = 0.5                    # points: a smaller difference does not matter, so variants can be found equivalent
    until = "decided"               # add seeds in rounds of `seeds` until all variants are decided ...
    max_seeds = 30                  # ... or have this many
    evaluate_every = "100steps"     # points of the learning curves, as train.py --evaluate-every (default: every epoch)

    [[variants]]                    # the first variant is the one that all others are compared with
    name = "mlp"
    idea = "The usual feed-forward."
    model.feed_forward = "mlp"

    [[variants]]
    name = "geglu"
    idea = "A gate replaces the activation."
    model.feed_forward = "geglu"

    [sizes.small]                   # overrides of the above for `--size small`; `full` in the same way
    epochs = 1
    variants.geglu.model.feed_forward_options.hidden = 43

Every other key is a setting, written as in presets/. Settings override each other in this order: preset, file, size,
`--set`, variant, variant at this size. `match = "none"` inside a variant excludes it from matching. Files with
`[[arms]]`, the former name of `[[variants]]`, are still read.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import SettingsError, unknown
from config.command_line import run_name
from config.own_parts import is_own_part, with_absolute_paths
from config.settings import Settings, resolve
from records.checkpoint_store import Interval

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUDGETS = ("epochs", "steps", "seconds")
DEFAULTS: dict[str, Any] = {
    "preset": "cpu",
    "dataset": "cifar100",
    "seeds": 3,
    "hold_out": 0.1,
    "match": "none",
    "margin": None,
    "until": "seeds",
    "max_seeds": None,
    "evaluate_every": None,
}
OWN = ("question", "sizes", "variants", *DEFAULTS, *BUDGETS)  # every other key is a setting
MATCHES = ("none", "parameters", "flops")
MOST_SEEDS = 1000  # against a typing mistake; the statistics have no limit
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class Variant:
    """One of the things compared. `overrides` are the texts `path=value` that `train.py --set` gets."""

    name: str
    idea: str
    overrides: list[str]
    settings: Settings
    is_matched: bool = True  # False where the variant says match = "none"


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
    match: str = "none"  # the cost that is made equal: none, parameters or flops
    margin: float | None = None  # points within which a difference does not matter
    max_seeds: int | None = None  # with until = "decided": seeds are added in rounds up to this many
    round_seeds: int | None = None  # seeds per round; `seeds` is then the number that was reached
    evaluate_every: str | None = None  # interval of evaluations; None: every epoch

    def tasks(self) -> list[tuple[Variant, int]]:
        """Return every variant with every seed."""
        return [(variant, seed) for variant in self.variants for seed in range(self.seeds)]


def read(
    path: Path,
    size: str | None = None,
    seeds: int | None = None,
    overrides: list[str] | None = None,
    final: bool = False,
) -> Experiment:
    """Read an experiment file.

    Args:
        size: name of one of its tables `sizes`; None takes `small` if the file has it.
        seeds: replaces the number of seeds of the file.
        overrides: texts `path=value` for all variants.
        final: the test split will be reported, so `hold_out = 0` is allowed.

    Raises:
        SettingsError: the file cannot be used; the message names the file, and the variant at fault if there is one.
    """
    overrides = [_with_absolute_path(text) for text in overrides or []]
    _check_overrides(overrides)
    tree = _rename_arms(path, _with_absolute_paths(path, _read_toml(path)), "[[arms]]")
    name = path.stem
    sizes = _table(path, "[sizes]", tree.get("sizes", {}))
    if size is None and "small" in sizes:
        size = "small"
    if size is not None and size not in sizes:
        raise SettingsError(
            f"{path.name}: "
            + (unknown("size", size, list(sizes)) if sizes else "it has no table [sizes]; leave out --size")
        )
    at_size = {}
    if size is not None:
        at_size = _rename_arms(path, _table(path, f"[sizes.{size}]", sizes[size]), f"[sizes.{size}.arms]")
        name += f"-{size}"
    _check_name(path, name)
    for key in ("question", "sizes"):
        if key in at_size:
            raise SettingsError(f"{path.name}: [sizes.{size}] cannot have its own {key}; set {key} for the whole file")
    budget, amount = _budget(path, tree, at_size)
    facts = DEFAULTS | _own(tree) | _own(at_size)
    if seeds is not None:
        facts["seeds"] = seeds
    _check_facts(path, facts, final)
    common = _flatten(_settings(tree)) + _flatten(_settings(at_size)) + overrides
    preset = facts["preset"]
    if preset.endswith(".toml"):  # a file next to this one, or an absolute path
        preset = str((path.parent / preset).resolve())
    variants = _read_variants(path, tree.get("variants", []), at_size.get("variants", {}), preset, common)
    return Experiment(
        name,
        " ".join(facts["question"].split()),
        preset,
        facts["dataset"],
        facts["seeds"],
        float(facts["hold_out"]),
        budget,
        amount,
        variants,
        facts["match"],
        facts["margin"] and float(facts["margin"]),
        facts["max_seeds"],
        facts["seeds"] if facts["max_seeds"] else None,
        facts["evaluate_every"],
    )


def check_distinct(path_name: str, variants: list[Variant], advice: str = "") -> None:
    """Raise SettingsError where two variants have the same settings, since they would be the same runs twice."""
    for i, variant in enumerate(variants):
        for other in variants[:i]:
            if variant.settings == other.settings:
                raise SettingsError(
                    f"{path_name}: the variants '{other.name}' and '{variant.name}' have the same settings{advice}"
                )


def _check_name(path: Path, name: str) -> None:
    """Refuse a file such as `..toml`, whose name would be that of a folder above the runs and the results."""
    try:
        run_name(name)
    except argparse.ArgumentTypeError as error:
        raise SettingsError(
            f"{path.name!r}: the name of an experiment {str(error).partition(';')[0]}; rename the file"
        ) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{path.name} is not valid TOML: {error}") from None


def _with_absolute_paths(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with user-defined parts that train.py finds from another folder; see config/own_parts.py."""
    try:
        return with_absolute_paths(tree, path.parent)
    except SettingsError as error:
        raise SettingsError(f"{path.name}: {error}") from None


def _with_absolute_path(override: str) -> str:
    setting, equals, text = override.partition("=")
    quoted = text.strip().strip('"')
    return f"{setting}={with_absolute_paths(quoted)}" if equals and is_own_part(quoted) else override


def _rename_arms(path: Path, tree: dict[str, Any], where: str) -> dict[str, Any]:
    """Accept the former name of the key `variants`."""
    if "arms" not in tree:
        return tree
    if "variants" in tree:
        raise SettingsError(f"{path.name}: {where} is the former name of variants; use one of the two names, not both")
    return {"variants" if key == "arms" else key: value for key, value in tree.items()}


def _table(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(f"{path.name}: {where} must be a table, not {value!r}")
    return value


def _own(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key in OWN}


def _settings(tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in OWN}


def _check_overrides(overrides: list[str]) -> None:
    """Refuse `--set` of what the file decides: train.py would never see it."""
    for text in overrides:
        key = text.partition("=")[0].strip().removeprefix("settings.").split(".")[0]
        if key in OWN:
            instead = "use --seeds" if key == "seeds" else f"set {key} in the experiment file"
            raise SettingsError(f"--set {text} has no effect on a comparison; {instead}")


def _budget(path: Path, tree: dict[str, Any], at_size: dict[str, Any]) -> tuple[str, float]:
    """Kind and amount of the budget; the budget of a size replaces that of the file."""
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
    if isinstance(amount, bool) or not isinstance(amount, number) or not 0 < amount < 1e12:
        expected = "number" if kind == "seconds" else "whole number"
        raise SettingsError(f"{path.name}: {kind} must be a {expected} above 0, not {amount!r}")
    return kind, amount


def _check_facts(path: Path, facts: dict[str, Any], final: bool) -> None:
    for key, kinds in (
        ("question", str),
        ("preset", str),
        ("dataset", str),
        ("seeds", int),
        ("hold_out", (int, float)),
        ("match", str),
        ("margin", (int, float, type(None))),
        ("until", str),
        ("max_seeds", (int, type(None))),
        ("evaluate_every", (str, type(None))),
    ):
        if not isinstance(facts.get(key), kinds) or isinstance(facts[key], bool):
            problem = f"{key} cannot be {facts[key]!r}" if key in facts else f'{key} is missing; add {key} = "..."'
            raise SettingsError(f"{path.name}: {problem}")
    if not 1 <= facts["seeds"] <= MOST_SEEDS:
        raise SettingsError(f"{path.name}: seeds must lie between 1 and {MOST_SEEDS}, not {facts['seeds']}")
    if not 0 <= facts["hold_out"] < 1 or (facts["hold_out"] == 0 and not final):
        raise SettingsError(
            f"{path.name}: hold_out={facts['hold_out']:g} leaves no validation split to compare variants on; "
            "it must lie between 0 and 1 (0 only with --final, which reports the test split)"
        )
    _check_match(path.name, facts["match"])
    _check_rounds(path.name, facts["until"], facts["seeds"], facts["max_seeds"])
    if facts["evaluate_every"] is not None:
        try:
            Interval.parse_evaluations(facts["evaluate_every"])
        except ValueError as error:
            raise SettingsError(f"{path.name}: evaluate_every: {error}") from None
    margin = facts["margin"]
    if margin is not None and not 0 < margin < 100:
        raise SettingsError(f"{path.name}: margin must be a number of points between 0 and 100, not {margin!r}")


def _check_rounds(where: str, until: str, seeds: int, max_seeds: int | None) -> None:
    if until not in ("seeds", "decided"):
        raise SettingsError(f"{where}: " + unknown("until", until, ["seeds", "decided"]))
    if (until == "decided") != (max_seeds is not None):
        raise SettingsError(f'{where}: until = "decided" and max_seeds = N belong together; give both or none')
    if max_seeds is not None and not seeds < max_seeds <= MOST_SEEDS:
        raise SettingsError(
            f"{where}: max_seeds must lie between seeds + 1 = {seeds + 1} and {MOST_SEEDS}, not {max_seeds}"
        )


def _check_match(where: str, match: Any) -> None:
    if match == "seconds":
        raise SettingsError(f'{where}: match = "seconds" is a budget; use seconds = N instead of epochs or steps')
    if match not in MATCHES:
        raise SettingsError(f"{where}: " + unknown("match", str(match), list(MATCHES)))


def _read_variants(path: Path, variants: Any, at_size: dict[str, Any], preset: str, common: list[str]) -> list[Variant]:
    if not isinstance(variants, list) or len(variants) < 2:
        raise SettingsError(f"{path.name}: a comparison needs at least two [[variants]]")
    names: list[str] = []
    for tree in variants:
        name = _table(path, "each of [[variants]]", tree).get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in names:
            raise SettingsError(
                f"{path.name}: every variant needs its own name of up to 100 letters, digits, '.', '_' and '-', "
                f"not {name!r}"
            )
        names.append(name)
    for name, tree in _table(path, "variants of a size", at_size).items():
        if name not in names:
            raise SettingsError(f"{path.name}: " + unknown("variant", name, names))
        _table(path, f"variants.{name} of a size", tree)
    read = [_read_variant(path, tree, at_size.get(tree["name"], {}), preset, common) for tree in variants]
    check_distinct(path.name, read)
    return read


def _read_variant(
    path: Path, variant: dict[str, Any], at_size: dict[str, Any], preset: str, common: list[str]
) -> Variant:
    where = f"{path.name}, variant '{variant['name']}'"
    if not isinstance(variant.get("idea"), str):
        raise SettingsError(f'{where}: state the idea in one sentence (idea = "...")')
    match = at_size.get("match", variant.get("match"))
    if match is not None and match != "none":
        raise SettingsError(f'{where}: match must be "none" here; set match = "parameters" for the whole file')
    own = {key: value for key, value in variant.items() if key not in ("name", "idea", "match")}
    at_size = {key: value for key, value in at_size.items() if key != "match"}
    for key in (*own, *at_size):
        if key in OWN:
            raise SettingsError(f"{where}: {key} is the same for all variants; set it for the whole file")
    overrides = common + _flatten(own) + _flatten(at_size)
    try:
        settings = resolve(preset, overrides)
    except SettingsError as error:
        message = str(error)
        for text in overrides:
            message = message.replace(f"--set {text}: ", "")
        raise SettingsError(f"{where}: {message}") from None
    return Variant(variant["name"], variant["idea"], overrides, settings, match is None)


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Return a tree of settings as texts `path=value`.

    Names of parts come before their options, since a new name discards the options of the former part.
    """
    texts = []
    for key, value in sorted(tree.items(), key=lambda item: (item[0] != "architecture", item[0].endswith("_options"))):
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            texts += _flatten(value, f"{path}.")
        else:
            if isinstance(value, float) and not math.isfinite(value):
                raise SettingsError(f"{path} must be a finite number, not {value}")
            texts.append(f"{path}={json.dumps(value, default=str)}")
    return texts
