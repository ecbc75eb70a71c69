"""User-defined parts: `path/to/file.py:NAME` as the value of any setting that names an entry of a registry.

    --set model.feed_forward=~/ideas/mine.py:SquaredReLU

A typed path is relative to the current folder of the command, or else to the project, so that a printed setting can be
typed anywhere. In a preset or an experiment it is relative to the folder of that file alone.
Settings hold it in one form, relative to the project where the file is inside it and absolute elsewhere, so that the
same part is the same setting from every folder. `find_entry` looks up a name in a registry, or loads such a part;
`config/own_modules.py` imports the file. Nothing here imports PyTorch; a user's file usually does.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common.errors import SettingsError, unknown
from common.paths import PROJECT
from common.text import type_and_first_line
from config.own_modules import import_file

Entry = TypeVar("Entry")
REFERENCE = re.compile(r"(.*[^/]\.py):([^\W\d]\w*(?:\.[^\W\d]\w*)*)", re.DOTALL)
FORM = "FILE.py:NAME"  # how messages name the form of a user-defined part


@dataclass(frozen=True)
class OwnPart:
    """A class, function or other callable in a user's Python file."""

    file: Path  # absolute, links resolved
    name: str  # may be dotted, such as Mine.with_bias

    @classmethod
    def parse(cls, text: Any, folders: Iterable[Path] = (PROJECT,)) -> OwnPart | None:
        """Return the part that a setting's value names; None for any other value.

        Args:
            folders: where a relative path is looked for; the first is meant where none has it.
        """
        found = REFERENCE.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            return None
        path = os.path.expanduser(found[1])
        candidates = [Path(os.path.realpath(os.path.join(folder, path))) for folder in folders]
        return cls(next((file for file in candidates if file.is_file()), candidates[0]), found[2])

    @property
    def text(self) -> str:
        """The part as settings hold it."""
        root = Path(os.path.realpath(PROJECT))
        file = self.file.relative_to(root) if self.file.is_relative_to(root) else self.file
        return f"{file}:{self.name}"


def is_own_part(value: Any) -> bool:
    return isinstance(value, str) and REFERENCE.fullmatch(value) is not None


def map_own_parts(tree: Any, function: Callable[[str, OwnPart], str], folders: Collection[Path] = (PROJECT,)) -> Any:
    """Return a tree of settings in which `function` has replaced every value that names a user-defined part.

    Args:
        function: gets the value and the part that it names.
        folders: as in `OwnPart.parse`.
    """
    if isinstance(tree, dict):
        return {key: map_own_parts(value, function, folders) for key, value in tree.items()}
    if isinstance(tree, list):
        return [map_own_parts(value, function, folders) for value in tree]
    part = OwnPart.parse(tree, folders)
    return tree if part is None else function(tree, part)


def own_parts_of(tree: Any, folders: Collection[Path] = (PROJECT,)) -> list[OwnPart]:
    """Return the user-defined parts that a tree of settings names, each once; `folders` as in `OwnPart.parse`."""
    found: dict[OwnPart, None] = {}

    def keep(text: str, part: OwnPart) -> str:
        found[part] = None
        return text

    map_own_parts(tree, keep, folders)
    return list(found)


def as_settings_hold_them(tree: Any, folder: Path | None = None, source: str = "") -> Any:
    """Return a tree of typed settings with every user-defined part in the form that settings hold.

    Args:
        folder: of the file that holds the tree; None for a command line.
        source: begins the error message.

    Raises:
        SettingsError: a file does not exist, or the value names a file but nothing in it.
    """
    if isinstance(tree, str) and tree.endswith(".py"):
        raise SettingsError(f"{source}{tree} names a file but no class or function in it; write {tree}:NAME")
    if isinstance(tree, dict):
        return {key: as_settings_hold_them(value, folder, source) for key, value in tree.items()}
    return _map_existing(tree, lambda part: part.text, folder, source)


def with_absolute_paths(tree: Any, folder: Path | None = None) -> Any:
    """Return a tree of typed settings that means the same parts in every current folder."""
    return _map_existing(tree, lambda part: f"{part.file}:{part.name}", folder)


def without_folders(tree: Any) -> Any:
    """Return a tree of settings for publication: a user-defined part is named by its file without the folder."""
    return map_own_parts(tree, lambda text, _: Path(text).name)


def published_word(word: str) -> str:
    """Return a word of a command line for publication: an absolute path and a user-defined part lose their folders.

    They may also be the value in --option=VALUE, model.attention=VALUE or --set=model.attention=VALUE.
    """
    text = word.strip().strip('"')
    name, equals, value = word.partition("=")
    if equals and not Path(text).is_absolute():
        return f"{name}={published_word(value)}"
    return Path(text).name if Path(text).is_absolute() or is_own_part(text) else word


def _map_existing(tree: Any, function: Callable[[OwnPart], str], folder: Path | None, source: str = "") -> Any:
    """Return a tree as `map_own_parts` does. Raises SettingsError for a part whose file does not exist."""

    def replaced(text: str, part: OwnPart) -> str:
        if not part.file.is_file():
            raise SettingsError(
                f"{source}{text}: there is no file {part.file}; give its path from "
                f"{'the folder of this file' if folder else 'the current folder'}, from ~ or from /"
            )
        return function(part)

    return map_own_parts(tree, replaced, [folder] if folder else [Path.cwd(), PROJECT])


def find_entry(table: Mapping[str, Entry], setting: str, name: str, more_names: Iterable[str] = ()) -> Entry:
    """Return an entry of a registry, or the user-defined part that `name` refers to.

    Args:
        setting: the words that name the setting in error messages.
        more_names: names besides those of the table, for the message.

    Raises:
        SettingsError: an unknown name, or a file that cannot be imported or has no such part.
    """
    part = OwnPart.parse(name)
    if part is not None:
        return load(part)
    if name not in table:
        raise SettingsError(unknown(setting, name, [*table, *more_names]))
    return table[name]


def load(part: OwnPart) -> Any:
    """Import the file of a user-defined part and return the part, which must be callable.

    Raises:
        SettingsError: the file cannot be imported, has no such name, or the name is not callable.
    """
    try:
        module = import_file(part.file)
    except (Exception, SystemExit) as error:
        raise SettingsError(f"{part.text}: the file cannot be imported: {describe(error, part)}") from error
    found: Any = module
    for name in part.name.split("."):
        if not hasattr(found, name):
            known = [
                key
                for key, value in vars(found).items()
                if callable(value) and getattr(value, "__module__", None) == module.__name__
            ]
            raise SettingsError(unknown(f"part of {part.file.name}", part.name, known))
        found = getattr(found, name)
    if not callable(found):
        raise SettingsError(f"{part.text} is a {type(found).__name__}; name a class or a function")
    return found


def describe(error: BaseException, part: OwnPart) -> str:
    """Return an error raised by a user's code in one line, with the innermost file and line of that code."""
    text = type_and_first_line(error)
    if isinstance(error, SyntaxError) and error.filename:
        return f"SyntaxError: {error.msg} ({Path(error.filename).name}, line {error.lineno})"
    folder = f"{part.file.parent}{os.sep}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
    return f"{text} ({os.path.relpath(frames[-1].filename, folder)}, line {frames[-1].lineno})" if frames else text


def call_by_name(setting: str, entry: Callable[..., Any], **values: Any) -> Any:
    """Call an entry with those of `values` that its signature names, or all of them if it takes `**kwargs`.

    Raises:
        SettingsError: an argument without a default has another name.
    """
    parameters = inspect.signature(entry).parameters.values()
    kinds = inspect.Parameter
    takes_any = any(parameter.kind is kinds.VAR_KEYWORD for parameter in parameters)
    named = {parameter.name for parameter in parameters if parameter.kind is not kinds.POSITIONAL_ONLY}
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is kinds.empty and parameter.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)
    ]
    if strange := [name for name in needed if name not in values]:
        raise SettingsError(
            f"{setting}: the argument {strange[0]} has no default and is none of {', '.join(values)}, "
            "which are passed by name"
        )
    return entry(**{name: value for name, value in values.items() if takes_any or name in named})


def default_arguments(entry: Callable[..., Any]) -> dict[str, Any]:
    """Return the arguments with a default that settings can hold, after the first one; tuples become lists."""
    found = {}
    for parameter in list(inspect.signature(entry).parameters.values())[1:]:
        value = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        try:
            json.dumps(value)
        except TypeError:
            continue  # no default, or one that no setting can express
        found[parameter.name] = value
    return found
