"""Options and reports that the programs of this folder share. Nothing here imports PyTorch.

data = add_data(parser)                                        --data-dir and --source
add_settings(parser, "spt-lsa")                                --preset and --set
parser.add_argument("--jobs", type=some_of("job", JOBS), ...)   names separated by commas, in the order of the table
parser.add_argument("--hosts", type=several(int), ...)         numbers separated by commas
parser.add_argument("--out", type=output_file, ...)            a path that is checked before the measurement
settings = step_settings(options.preset, options.set)          the settings of a training step that is measured
report = {**origin(), ...}                                     command, commit and versions of the measurement
keep((options.json, text), (options.markdown, table))          the files that the user asked for
note("round 1 of 3")                                           progress on stderr, beside the tables on stdout
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

from common.errors import SettingsError, unknown
from common.output_files import check_new_folder
from common.text import without_paths
from config.catalog import SOURCES
from config.command_line import Parser
from config.settings import Settings, resolve
from records.provenance import provenance

Number = TypeVar("Number", int, float)


def add_data(parser: Parser, source: bool = True) -> argparse._ArgumentGroup:
    """Add the options for the dataset and return their group."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data/cifar100"),
        metavar="DIR",
        help="prepared dataset (default: %(default)s)",
    )
    if source:
        group.add_argument(
            "--source", default="auto", choices=SOURCES, help="input backend, as in train.py (default: auto)"
        )
    return group


def add_settings(parser: Parser, preset: str) -> argparse._ArgumentGroup:
    """Add the options for the network and its training and return their group."""
    group = parser.add_argument_group("what to train")
    group.add_argument(
        "--preset", default=preset, metavar="NAME", help="preset name or .toml file (default: %(default)s)"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="override one setting; may be repeated"
    )
    return group


def step_settings(preset: str, overrides: list[str], **run_facts: Any) -> Settings:
    """Resolve the settings of a training step: images have their full side, unless an override says otherwise.

    Raises:
        SettingsError: as `config.settings.resolve`.
    """
    return resolve(preset, ["resizing.initial_scale=1", *overrides], **run_facts)


def add_reports(parser: Parser) -> argparse._ArgumentGroup:
    """Add the options for output files and return their group."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json", type=output_file, metavar="FILE", help="write all measurements to this JSON file (default: none)"
    )
    group.add_argument(
        "--markdown", type=output_file, metavar="FILE", help="write the tables to this Markdown file (default: none)"
    )
    return group


def output_folder(text: str) -> Path:
    """Return the path of a folder to write into, which may not exist yet: the `type` of an option."""
    path = Path(os.path.expanduser(text))
    try:
        check_new_folder(path, "folder")
    except SettingsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def output_file(text: str) -> Path:
    """Return the path of a file to write, whose folder may not exist yet: the `type` of an option."""
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; name a file in it")
    if not path.exists():
        output_folder(str(path.parent))
    elif not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} is not writable; choose another file")
    return path


def some_of(kind: str, known: Collection[str], none: bool = False) -> Callable[[str], list[str]]:
    """Return the `type` of an option that takes names separated by commas; `none` allows "none".

    The names come back in the order of `known`.
    """

    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",") if name.strip()]
        if none and chosen == ["none"]:
            return []
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(unknown(kind, name, list(known)))
        if not chosen:
            raise argparse.ArgumentTypeError(f"needs at least one {kind}: {', '.join(known)}")
        return [name for name in known if name in chosen]

    return parse


def several(form: type[Number]) -> Callable[[str], list[Number]]:
    """Return the `type` of an option that takes positive numbers separated by commas; sorted, without duplicates."""

    def parse(text: str) -> list[Number]:
        try:
            values = sorted({form(part) for part in text.split(",")})
        except ValueError:
            values = []
        if not values or not values[0] > 0:
            raise argparse.ArgumentTypeError(f"needs numbers above 0, such as 1,2; got {text}")
        return values

    return parse


def origin() -> dict[str, Any]:
    """Return commit, versions, source code and the command without the folders of this machine."""
    facts = provenance()
    code = {**facts["code"], "files": {without_paths(path): digest for path, digest in facts["code"]["files"].items()}}
    return {**facts, "command": [without_paths(word) for word in facts["command"]], "code": code}


def keep(*reports: tuple[Path | None, str]) -> None:
    """Write each text to its file, unless the path is None."""
    for path, text in reports:
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def note(text: str) -> None:
    """Print a line of progress at once; stdout is for the results."""
    print(text, file=sys.stderr, flush=True)
