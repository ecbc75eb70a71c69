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

from config.optimizer_defaults import OPTIMIZER_PARAMS
from config.settings import Settings, SettingsError, preset_names, resolve, table_names

ELSEWHERE = {"learning_rate": "lr", "batch_size": "train_batch_size", "amp": "bf16"}  # what others call a setting
TABLES = {  # setting -> the table that holds its names
    "strategy": ("parallel/strategies.py", "STRATEGIES"),
    "model.architecture": ("models/published/table.py", "ARCHITECTURES"),
    "model.patch_embedding": ("models/patch_embedding.py", "PATCH_EMBEDDINGS"),
    "model.position": ("models/patch_embedding.py", "POSITIONS"),
    "model.pooling": ("models/patch_embedding.py", "POOLINGS"),
    "model.block": ("model.py", "BLOCKS"),
    "model.attention": ("models/attention.py", "ATTENTIONS"),
    "model.feed_forward": ("models/feed_forward.py", "FEED_FORWARDS"),
}


def in_one_sentence(main: Callable[[], int | None]) -> int:
    """Call a script's `main`; the errors of the person's making become one line on the screen. Returns the exit code."""
    from image_data.dataset import DatasetError
    from records.run_folder import RunError

    try:
        return main() or 0
    except (SettingsError, DatasetError, RunError) as error:
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
        super().__init__(prog=re.match(r"python \S+|\S+", usage)[0], usage=f"{usage} [options]", description=description,
                         epilog=(f"{notes}\n\n" if notes else "") + f"example:\n{examples}", allow_abbrev=False,
                         formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self._not_understood(rest))
        return found

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        if "_ARGCOMPLETE" in os.environ and not self.is_completing:  # the shell asks, after a Tab
            self.is_completing = True  # in the course of which it parses
            complete(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """One sentence; several processes of one command say it once."""
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {message} (all options: {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def _not_understood(self, words: list[str]) -> str:
        """What to say of words that no option takes."""
        word = next((word for word in words if word.startswith("-")), words[0])
        options = [option for action in self._actions if action.help is not argparse.SUPPRESS for option in action.option_strings]
        has_settings = "--set" in options
        if not word.startswith("-"):
            is_setting = has_settings and "=" in word
            return f"unexpected argument '{word}'" + (f"; did you mean --set {word}?" if is_setting else "")
        name, equals, value = word.partition("=")
        following = words[words.index(word) + 1:]
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


def names_of(path: str) -> list[str]:
    """The names that a setting can have; empty where no table holds them."""
    if path not in TABLES:
        return []
    names = list(table_names(*TABLES[path]))
    return ["vit", *names, "timm:NAME"] if path == "model.architecture" else names


def setting_paths(settings: Settings | None = None) -> list[str]:
    """The path of every setting that `--set` takes, beside these settings; by default, whichever optimiser they name."""
    def walk(tree: dict[str, Any], prefix: str) -> list[str]:
        return [path for key, value in tree.items()
                for path in (walk(value, f"{prefix}{key}.") if isinstance(value, dict) and not key.endswith("_options") else [f"{prefix}{key}"])]

    tree = (settings or resolve(None, [])).as_dict()
    if settings is None:
        tree["engine"]["optimizer"]["params"] = {name: None for params in OPTIMIZER_PARAMS.values() for name in params}
    return walk({**tree.pop("engine"), **tree}, "")


def setting_of(name: str) -> str | None:
    """The path of the setting that somebody meant who made an option of it: `lr`, `weight-decay`, `model.width`."""
    name = name.replace("-", "_")
    name = ELSEWHERE.get(name, name)
    paths = setting_paths()
    exact = [path for path in paths if path == name or path.endswith(f".{name}") or path == f"{name}.enabled"]
    return exact[0] if exact else None


def complete(parser: argparse.ArgumentParser) -> None:
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


def settings_like(prefix: str) -> list[str]:
    """`path=` of every setting, or `path=name` where the path is complete and a table holds its names."""
    path, equals, _ = prefix.partition("=")
    if equals:
        return [f"{path}={name}" for name in names_of(path)]
    return [f"{path}=" for path in setting_paths()]
