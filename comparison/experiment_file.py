"""An experiment file, `experiments/<name>.toml`, read and checked before anything runs.

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
    max_runs = 100                  # tuning included; no round of runs is started that would exceed it
    max_hours = 8                   # summed over the runs, tuning included; then running runs save, and no other starts

    [tune]                          # each variant gets its own value, chosen first; comparison/tuning.py has all keys
    "optimizer.params.lr" = [1.5e-3, 5e-3, 1.5e-2]

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
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import SettingsError, unknown
from comparison.experiment import Experiment, Variant, check_candidates, check_distinct
from comparison.experiment_keys import DEFAULTS, OWN, check_facts, read_budget
from comparison.tuning import Tuning, read_tuning
from config.command_line import run_name
from config.differences import leaves
from config.overrides import path_of
from config.own_parts import is_own_part, with_absolute_paths
from config.settings import Settings, check_keys, combine, resolve
from config.toml_file import read_toml

VARIANT_KEYS = ("name", "idea", "match")  # of a variant; every other key is a setting
PROSE = ("question", "idea", "name")  # texts that may mention a file without meaning a part in it
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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
    tree = _rename_arms(path, _with_absolute_paths(path, read_toml(path, str(path))), "[[arms]]")
    check_keys(path.name, tree, OWN)
    size, at_size = _read_size(path, tree, size)
    name = path.stem if size is None else f"{path.stem}-{size}"
    _check_name(path, name)
    budget, amount = read_budget(path, tree, at_size)
    facts = DEFAULTS | _own(tree) | _own(at_size)
    if seeds is not None:
        facts["seeds"] = seeds
    check_facts(path, facts, final)
    common = [as_overrides(_settings(tree)), as_overrides(_settings(at_size)), overrides]
    preset = facts["preset"]
    if preset.endswith(".toml"):  # a file next to this one, or an absolute path
        preset = str((path.parent / preset).resolve())
    variants = _read_variants(path, tree.get("variants", []), at_size.get("variants", {}), preset, common)
    tuning = None if facts["tune"] is None else read_tuning(path.name, facts["tune"])
    if tuning:
        _check_tuning(path, tuning, facts["hold_out"], _paths_by_variant(tree, at_size))
        for variant in variants:
            check_candidates(path.name, variant, preset, tuning)
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
        tuning,
        facts["max_runs"],
        facts["max_hours"],
        facts["evaluate_every"],
    )


def _read_size(path: Path, tree: dict[str, Any], size: str | None) -> tuple[str | None, dict[str, Any]]:
    """Return the name of the size, `small` where the file has it and none was asked for, and its table of overrides."""
    sizes = _table(path, "[sizes]", tree.get("sizes", {}))
    if size is None and "small" in sizes:
        size = "small"
    if size is None:
        return None, {}
    if size not in sizes:
        raise SettingsError(
            f"{path.name}: "
            + (unknown("size", size, list(sizes)) if sizes else "it has no table [sizes]; leave out --size")
        )
    at_size = _rename_arms(path, _table(path, f"[sizes.{size}]", sizes[size]), f"[sizes.{size}.arms]")
    check_keys(f"{path.name}: [sizes.{size}]", at_size, OWN)
    for key in ("question", "sizes"):
        if key in at_size:
            raise SettingsError(f"{path.name}: [sizes.{size}] cannot have its own {key}; set {key} for the whole file")
    return size, at_size


def _check_name(path: Path, name: str) -> None:
    """Refuse a file such as `..toml`, whose name would be that of a folder above the runs and the results."""
    try:
        run_name(name)
    except argparse.ArgumentTypeError as error:
        raise SettingsError(
            f"{path.name!r}: the name of an experiment {str(error).partition(';')[0]}; rename the file"
        ) from None


def _with_absolute_paths(path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with user-defined parts that train.py finds from another folder; see config/own_parts.py."""

    def absolute(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: value if key in PROSE else absolute(value) for key, value in tree.items()}
        return [absolute(one) for one in tree] if isinstance(tree, list) else with_absolute_paths(tree, path.parent)

    try:
        return absolute(tree)
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
        key = path_of(text).split(".")[0]
        if key in OWN:
            instead = "use --seeds" if key == "seeds" else f"set {key} in the experiment file"
            raise SettingsError(f"--set {text} has no effect on a comparison; {instead}")


def _check_tuning(path: Path, tuning: Tuning, hold_out: float, own: dict[str, set[str]]) -> None:
    """Check the names of the tuned settings.

    Args:
        own: variant -> paths of the settings that it has of its own.
    """
    if not hold_out:
        raise SettingsError(f"{path.name}: tune chooses by the validation split, and hold_out = 0 leaves none")
    for key in tuning.keys:
        if key.split(".")[0] in OWN:
            raise SettingsError(f"{path.name}: tune cannot choose {key}, which is the same for all variants")
        for name, paths in own.items():
            if key in paths:
                raise SettingsError(
                    f"{path.name}: variant '{name}' sets {key} itself, and tune would replace it; remove one of the two"
                )


def _paths_by_variant(tree: dict[str, Any], at_size: dict[str, Any]) -> dict[str, set[str]]:
    """Return variant -> paths of the settings that it has of its own."""
    trees = [(one["name"], one) for one in tree["variants"]] + list(at_size.get("variants", {}).items())
    found: dict[str, set[str]] = {}
    for name, own in trees:
        found.setdefault(name, set()).update(map(path_of, as_overrides(_settings(own))))
    return found


def _read_variants(
    path: Path, variants: Any, at_size: dict[str, Any], preset: str, common: list[list[str]]
) -> list[Variant]:
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
    path: Path, variant: dict[str, Any], at_size: dict[str, Any], preset: str, common: list[list[str]]
) -> Variant:
    """Read one variant. `common` are the overrides for all variants, a list for each of their sources."""
    where = f"{path.name}, variant '{variant['name']}'"
    if not isinstance(variant.get("idea"), str):
        raise SettingsError(f'{where}: state the idea in one sentence (idea = "...")')
    match = at_size.get("match", variant.get("match"))
    if match is not None and match != "none":
        raise SettingsError(f'{where}: match must be "none" here; set match = "parameters" for the whole file')
    own = {key: value for key, value in variant.items() if key not in VARIANT_KEYS}
    at_size = {key: value for key, value in at_size.items() if key != "match"}
    for key in (*own, *at_size):
        if key in OWN:
            raise SettingsError(f"{where}: {key} is the same for all variants; set it for the whole file")
    check_keys(where, variant, VARIANT_KEYS)
    check_keys(f"{where}, this size", at_size, ["match"])
    overrides: list[str] = []
    left_out: list[str] = []
    for source in (*common, as_overrides(own), as_overrides(at_size)):
        overrides, discarded = combine(preset, overrides, source)
        left_out += discarded
    try:
        settings = resolve_quietly(preset, overrides)
    except SettingsError as error:
        shared = [text for source in common for text in source]
        raise SettingsError(f"{path.name if _fails_alike(error, preset, shared) else where}: {error}") from None
    return Variant(
        variant["name"], variant["idea"], overrides, settings, match is None, left_out=tuple(dict.fromkeys(left_out))
    )


def resolve_quietly(preset: str, overrides: list[str]) -> Settings:
    """Return the settings; the SettingsError of a wrong one does not name `--set`, which the user did not write."""
    try:
        return resolve(preset, overrides)
    except SettingsError as error:
        message = str(error)
        for text in overrides:
            message = message.replace(f"--set {text}: ", "")
        raise SettingsError(message) from None


def _fails_alike(problem: SettingsError, preset: str, common: list[str]) -> bool:
    """Return whether what all variants share has this problem without any variant."""
    try:
        resolve_quietly(preset, common)
    except SettingsError as error:
        return str(error) == str(problem)
    return False


def as_overrides(tree: Mapping[str, Any]) -> list[str]:
    """Return a tree of settings, or values by path, as texts `path=value`."""
    return [f"{path}={json.dumps(value, default=str)}" for path, value in leaves(dict(tree)) if path]
