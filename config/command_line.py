"""The command line of every script: grouped help with one example, and a mistyped option answered with the nearest one.

    parser = Parser("python evaluate.py [run]", "What the script does.", example="python evaluate.py runs/mine")

A setting given as an option of its own (`--lr 1e-3`, `--model.width=64`) is answered with the `--set` that it must be.
`source environment/completion.sh` makes the Tab key complete options, presets, strategies and settings. Nothing here imports PyTorch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from common.errors import UserError
from config.catalog import names_of, setting_of, settings_like
from config.settings import preset_names


def run_cli(main: Callable[[], int | None]) -> int:
    """Call a script's `main`; the errors of the person's making become one line on the screen. Returns the exit code."""
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose usage is one line, whose help ends with an example, and whose errors are one sentence.

    Args:
        usage: the command and its positional arguments; "[options]" follows.
        example: a command that works as it stands; several, one a line.
        notes: paragraphs before the example.
    """

    is_completing = False

    def __init__(self, usage: str, description: str, example: str, notes: str = ""):
        examples = "\n".join(f"  {line}" for line in example.splitlines())
        super().__init__(
            prog=re.match(r"python \S+|\S+", usage)[0],
            usage=f"{usage} [options]",
            description=description,
            epilog=(f"{notes}\n\n" if notes else "") + f"example:\n{examples}",
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self._not_understood(rest))
        return found

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if "_ARGCOMPLETE" in os.environ and not self.is_completing:  # the shell asks, after a Tab
            self.is_completing = True  # in the course of which it parses
            autocomplete(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One sentence; several processes of one command say it once."""
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {message} (all options: {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def _not_understood(self, words: list[str]) -> str:
        """What to say of words that no option takes."""
        word = next((word for word in words if word.startswith("-")), words[0])
        options = [
            option
            for action in self._actions
            if action.help is not argparse.SUPPRESS
            for option in action.option_strings
        ]
        has_settings = "--set" in options
        if not word.startswith("-"):
            is_setting = has_settings and "=" in word
            return f"unexpected argument '{word}'" + (f"; did you mean --set {word}?" if is_setting else "")
        name, equals, value = word.partition("=")
        following = words[words.index(word) + 1 :]
        value = value if equals else following[0] if following and not following[0].startswith("--") else "VALUE"
        meant = setting_of(name.lstrip("-")) if has_settings else None
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
        if meant:
            return f"unknown option {name}; did you mean --set {meant}={value}?"
        return f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "")


def at_least_one(text: str) -> int:
    """A whole number of steps, epochs or images: the `type` of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)


def autocomplete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell with what may stand at the cursor, and end the process."""
    import argcomplete

    completers: dict[str, Callable[..., list[str]]] = {
        "--preset": lambda **_: preset_names(),
        "--strategy": lambda **_: names_of("strategy"),
        "--set": lambda prefix, **_: settings_like(prefix),
    }
    for action in parser._actions:
        for option in action.option_strings:
            if option in completers and not action.choices:
                action.completer = completers[option]
    argcomplete.autocomplete(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options --preset and --set."""
    parser.add_argument(
        "--preset", metavar="NAME", help=f"start from it: {', '.join(preset_names())}, or a .toml file (default: none)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a setting: model.width=192; repeat for more",
    )
