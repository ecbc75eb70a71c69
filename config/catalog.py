"""Names of every table and the path of every setting, without importing PyTorch."""

from __future__ import annotations

import ast
from typing import Any

from common.paths import PROJECT
from config.optimizer_defaults import OPTIMIZER_PARAMS
from config.settings import Settings, resolve

SOURCES = ("auto", "resident", "files", "tensor")  # of images
ALIASES = {"learning_rate": "lr", "batch_size": "train_batch_size", "amp": "bf16"}  # what others call a setting
NAME_TABLES = {  # setting -> the table that holds its names
    "strategy": ("parallel/strategies.py", "STRATEGIES"),
    "model.architecture": ("models/published/table.py", "ARCHITECTURES"),
    "model.patch_embedding": ("models/patch_embedding.py", "PATCH_EMBEDDINGS"),
    "model.position": ("models/position.py", "POSITIONS"),
    "model.pooling": ("models/pooling.py", "POOLINGS"),
    "model.block": ("model.py", "BLOCKS"),
    "model.attention": ("models/attention.py", "ATTENTIONS"),
    "model.feed_forward": ("models/feed_forward.py", "FEED_FORWARDS"),
}


def names_of(path: str) -> list[str]:
    """The names that a setting can have; empty where no table holds them."""
    if path not in NAME_TABLES:
        return []
    names = list(table_names(*NAME_TABLES[path]))
    return ["vit", "sl-vit", *names, "timm:NAME"] if path == "model.architecture" else names


def setting_paths(settings: Settings | None = None) -> list[str]:
    """The path of every setting that `--set` takes, beside these settings; by default, whichever optimiser they name."""

    def walk(tree: dict[str, Any], prefix: str) -> list[str]:
        return [
            path
            for key, value in tree.items()
            for path in (
                walk(value, f"{prefix}{key}.")
                if isinstance(value, dict) and not key.endswith("_options")
                else [f"{prefix}{key}"]
            )
        ]

    tree = (settings or resolve(None, [])).as_dict()
    if settings is None:
        tree["engine"]["optimizer"]["params"] = {name: None for params in OPTIMIZER_PARAMS.values() for name in params}
    return walk({**tree.pop("engine"), **tree}, "")


def setting_of(name: str) -> str | None:
    """The path of the setting that somebody meant who made an option of it: `lr`, `weight-decay`, `model.width`."""
    name = name.replace("-", "_")
    name = ALIASES.get(name, name)
    paths = setting_paths()
    exact = [path for path in paths if path == name or path.endswith(f".{name}") or path == f"{name}.enabled"]
    return exact[0] if exact else None


def settings_like(prefix: str) -> list[str]:
    """`path=` of every setting, or `path=name` where the path is complete and a table holds its names."""
    path, equals, _ = prefix.partition("=")
    if equals:
        return [f"{path}={name}" for name in names_of(path)]
    return [f"{path}=" for path in setting_paths()]


def table_names(file: str, table: str) -> dict[str, str]:
    """Names and first docstring lines of a table such as FEED_FORWARDS, read from the source without importing it.

    Importing `models/feed_forward.py` would import PyTorch, which is too slow for `--help`.
    """
    tree = ast.parse((PROJECT / file).read_text(encoding="utf-8"))
    docs = _first_lines(tree)
    for node in tree.body:  # entries that the table's file imports from a file beside it
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
            entries = zip(node.value.keys, node.value.values, strict=True)
            return {name.value: docs.get(getattr(part, "id", ""), getattr(part, "value", "")) for name, part in entries}
    raise LookupError(f"{file} has no table {table}")


def _first_lines(tree: ast.Module) -> dict[str, str]:
    """First docstring line of every class and function at the top of a source file."""
    named = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return {node.name: (ast.get_docstring(node) or "").split("\n")[0] for node in named}
