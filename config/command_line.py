"""The command line of every script: grouped help with an example, and suggestions for mistyped options.

    parser = Parser("python evaluate.py [run]", "What the script does.", example="python evaluate.py runs/mine")

A setting given as an option (`--lr 1e-3`, `--model.width=64`) is answered with the `--set` that does it. `~` at the
start of a path is the home folder, also in `--runs-dir=~/runs`, which shells leave alone. `source
environment/completion.sh` makes the Tab key complete options, presets, strategies and settings. Nothing here imports
PyTorch.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.display import protect_streams
from common.errors import EXIT_INTERRUPTED, SettingsError, UserError
from common.output_files import disk_problem
from common.stop_signal import stop_requested
from config.catalog import names_of, setting_of, settings_like
from config.settings import preset_names

SHARED_ERROR_SECONDS = 5.0  # DeepSpeed's launcher looks once a second whether a process has failed
MAX_NAME_BYTES = 200  # file systems allow 255; ".old-1" and the like are appended
ELSEWHERE = {  # options of other programs that neither an option nor a setting replaces
    "--device": "training uses the GPU, or the CPU without one; DS_ACCELERATOR=cpu chooses the CPU",
    "--resume": "starting the same command again resumes the run; --fresh starts over",
    "--gpus": "./launch_local_train.sh uses every GPU, train.py alone one; CUDA_VISIBLE_DEVICES chooses",
    "--gpu": "./launch_local_train.sh uses every GPU, train.py alone one; CUDA_VISIBLE_DEVICES chooses",
    "--output": "--runs-dir and --name choose the run folder",
    "--output-dir": "--runs-dir and --name choose the run folder",
    "--out": "--runs-dir and --name choose the run folder",
    "--num-workers": "images are read by DALI or from memory, so there are no workers to choose",
    "--workers": "images are read by DALI or from memory, so there are no workers to choose",
    "--root": "train.py takes an image tree as --data-dir DIR",
    "--pretrained": "--init-weights SOURCE loads initial weights",
    "--checkpoint": "starting the same command again resumes the run; --init-weights FILE loads weights alone",
}
OTHER_UNITS = {  # settings that other projects give as epochs, steps or a learning rate
    "schedule.warmup_fraction": "FRACTION (a fraction of the run's steps, such as 0.05)",
    "schedule.final_factor": "FACTOR (a factor of the peak learning rate, such as 0.01)",
}


def run_cli(main: Callable[[], int | None]) -> int:
    """Call a script's `main` and print what the user can fix as one line. Returns the exit code.

    A reader of the output that goes away (`| head`) and a closed stdout or stderr end nothing.
    """
    protect_streams()
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if (problem := disk_problem(error)) is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 1


def reports_errors() -> bool:
    """Whether this process prints an error that all processes of a run may share, so that it is printed once.

    Process 0 does. Another one waits whether the launcher ends it, because process 0 has failed. If not, it failed
    alone, or there is no launcher and RANK is left over in the environment.
    """
    if os.environ.get("RANK", "0") in ("", "0"):
        return True
    deadline = time.monotonic() + SHARED_ERROR_SECONDS
    while not (ended := stop_requested()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not ended


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with usage on one line, an example at the end of its help, and errors of one sentence.

    Args:
        usage: the command and its positional arguments; "[options]" is appended.
        example: a command that works as written; several commands are separated by newlines.
        notes: paragraphs before the example.
    """

    is_completing = False

    def __init__(self, usage: str, description: str, example: str, notes: str = ""):
        examples = "\n".join(f"  {line}" for line in example.splitlines())
        program = re.match(r"python \S+|\S+", usage)
        assert program is not None, "the usage names the program"
        super().__init__(
            prog=program[0],
            usage=f"{usage} [options]",
            description=description,
            epilog=(f"{notes}\n\n" if notes else "") + f"example:\n{examples}",
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28),
        )

    def parse_args(  # type: ignore[override]  # typeshed has one overload for each type of `namespace`
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(self._not_understood(rest))
        return found

    def parse_known_args(  # type: ignore[override]  # as above
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        if "_ARGCOMPLETE" in os.environ and not self.is_completing:  # the shell asks for completions after a Tab
            self.is_completing = True  # completing parses arguments too
            autocomplete(self)
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, list):
                setattr(found, name, [self._expanded(item) for item in value])
            else:
                setattr(found, name, self._expanded(value))
        return found, rest

    def _expanded(self, value: Any) -> Any:
        """A path with `~` replaced by the home folder; any other value unchanged."""
        if not isinstance(value, Path):
            return value
        try:
            return value.expanduser()
        except RuntimeError:
            self.error(f"there is no home folder for {value.parts[0]}; write the path in full")

    def error(self, message: str) -> NoReturn:
        """Print one sentence and exit with 2; of several processes, one prints."""
        if reports_errors():
            print(f"error: {message} (all options: {self.prog} --help)", file=sys.stderr)
        sys.exit(2)

    def refuse_unused(self, args: argparse.Namespace, used: set[str], task: str) -> None:
        """Raise SettingsError for an option that was given another value than its default, and is not in `used`."""
        for name, value in vars(args).items():
            if name not in used and value != self.get_default(name):
                raise SettingsError(f"--{name.replace('_', '-')} does not apply to {task}. Leave it out")

    def _not_understood(self, words: list[str]) -> str:
        """Return the sentence for words that no option takes."""
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
        if name in ELSEWHERE and has_settings:
            return f"unknown option {name}: {ELSEWHERE[name]}"
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
        if meant:
            return f"unknown option {name}; did you mean --set {meant}={suggested_value(meant, value)}?"
        return f"unknown option {name}" + (f"; did you mean {near[0]}?" if near else "")


def suggested_value(path: str, value: str) -> str:
    """The value for a suggested `--set`: the name as the registry spells it; OTHER_UNITS where another was meant."""
    if path in OTHER_UNITS:
        return OTHER_UNITS[path]
    by_lower_case = {name.lower(): name for name in names_of(path)}
    return by_lower_case.get(value.lower(), value)


def at_least_one(text: str) -> int:
    """A whole number of steps, epochs or images: the `type` of an option."""
    return _whole_number(text, 1)


def at_least_zero(text: str) -> int:
    """A whole number of repetitions, which may be none: the `type` of an option."""
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {text}") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, not {text}")
    return number


def fraction(text: str) -> float:
    """A number between 0 and 1, both excluded."""
    number = _number(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, for example 0.1, not {text}")
    return number


def above_zero(text: str) -> float:
    """A positive finite rate or time."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def run_name(text: str) -> str:
    """The name of a run folder, which is one path component: the `type` of an option."""
    if text in ("", ".", "..") or "/" in text or "\\" in text:
        raise argparse.ArgumentTypeError(
            f"must be a single folder name, not {text!r}; --runs-dir chooses the folder above"
        )
    if text.startswith("-") or text != text.strip():
        raise argparse.ArgumentTypeError(f"must not start with '-' or a space, or end with a space, not {text!r}")
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp", "Cs") for letter in text):
        raise argparse.ArgumentTypeError(f"must not contain control characters, not {text!r}")
    if len(os.fsencode(text)) > MAX_NAME_BYTES:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_NAME_BYTES} bytes long, not {len(os.fsencode(text))}")
    return text


def autocomplete(parser: argparse.ArgumentParser) -> None:
    """Print the completions at the cursor for the shell, and end the process."""
    import argcomplete

    completers: dict[str, Callable[..., list[str]]] = {
        "--preset": lambda **_: preset_names(),
        "--strategy": lambda **_: names_of("strategy"),
        "--set": lambda prefix, **_: settings_like(prefix),
    }
    for action in parser._actions:
        for option in action.option_strings:
            if option in completers and not action.choices:
                action.completer = completers[option]  # type: ignore[attr-defined]  # argcomplete reads it
    argcomplete.autocomplete(parser)


def add_settings(parser: argparse.ArgumentParser, example: str = "model.width=192") -> None:
    """Add the options --preset and --set, with a setting that fits the script as the example in the help."""
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"preset that the settings start from: {', '.join(preset_names())}, or a .toml file (default: none)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help=f"override one setting, for example {example}; repeat for more",
    )
