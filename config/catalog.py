"""Names in every registry and the path of every setting, without importing PyTorch."""

from __future__ import annotations

import ast
import sys
from functools import cache
from typing import Any

from common.errors import SettingsError, unknown
from common.paths import PROJECT
from config.optimizer_defaults import OPTIMIZER_PARAMS
from config.overrides import meant_path, paths_of
from config.own_parts import FORM, is_own_part
from config.settings import Settings, declared_settings, resolve

SOURCES = ("auto", "resident", "files", "tensor")  # image sources of --source


@cache
def _names_in(file: str, table: str) -> dict[str, str]:
    return table_names(file, table)


def names_of(path: str) -> list[str]:
    """The names that a setting can have; empty for a setting that takes other values."""
    declared = declared_settings().get(path)
    if declared is None:
        return []
    if declared.table is None or declared.choices:
        return list(declared.choices)
    file, table = declared.table
    # A registry that is imported already may have entries that a program added.
    imported = sys.modules.get(file.removesuffix(".py").replace("/", "."))
    names = list(getattr(imported, table, None) or _names_in(file, table))
    return ["vit", "sl-vit", *names, "timm:NAME"] if path == "model.architecture" else names


def check_names(settings: Settings) -> None:
    """Check every setting that names an entry of a registry, without importing the registry.

    Raises:
        SettingsError: an unknown name.
    """
    tree = settings.as_dict()
    tree |= tree.pop("engine")
    for path, declared in declared_settings().items():
        if declared.table is None:
            continue
        value: Any = tree
        for key in path.split("."):
            value = value[key]
        known = names_of(path)
        if value in known or is_own_part(value) or (path == "model.architecture" and value.startswith("timm:")):
            continue
        raise SettingsError(unknown(path.removeprefix("model.").replace("_", "-"), value, [*known, FORM]))


def setting_paths(settings: Settings | None = None) -> list[str]:
    """The path of every setting that `--set` takes under these settings; by default, of every optimizer."""
    tree = (settings or resolve(None, [])).as_dict()
    if settings is None:
        tree["engine"]["optimizer"]["params"] = {name: None for params in OPTIMIZER_PARAMS.values() for name in params}
    return paths_of(tree)


def setting_of(name: str) -> str | None:
    """The path of the setting that a user means by an option such as `lr`, `weight-decay` or `model.width`."""
    return meant_path(name, setting_paths())


def settings_like(prefix: str) -> list[str]:
    """Completions of `--set`: `path=` of every setting, or `path=name` where the path is complete and has names."""
    path, equals, _ = prefix.partition("=")
    if equals:
        return [f"{path}={name}" for name in names_of(path)]
    return [f"{path}=" for path in setting_paths()]


def table_names(file: str, table: str) -> dict[str, str]:
    """Return names and first docstring lines of a registry such as FEED_FORWARDS, read from its source.

    Importing `models/feed_forward.py` would import PyTorch, which is too slow for `--help`.
    """
    tree = ast.parse((PROJECT / file).read_text(encoding="utf-8"))
    docs = _first_lines(tree)
    for node in tree.body:  # entries that the registry imports from another file
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and (source := PROJECT / f"{node.module.replace('.', '/')}.py").is_file()
        ):
            there = _first_lines(ast.parse(source.read_text(encoding="utf-8")))
            docs.update({alias.asname or alias.name: there.get(alias.name, "") for alias in node.names})
    for node in tree.body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(getattr(target, "id", None) == table for target in targets):
            written: Any = getattr(node, "value", None)  # a dictionary, as the entries of a table are
            entries = zip(written.keys, written.values, strict=True)
            return {name.value: docs.get(getattr(part, "id", ""), getattr(part, "value", "")) for name, part in entries}
    raise LookupError(f"{file} has no table {table}")


def _first_lines(tree: ast.Module) -> dict[str, str]:
    """First docstring line of every class and function at the top of a source file."""
    named = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return {node.name: (ast.get_docstring(node) or "").split("\n")[0] for node in named}
