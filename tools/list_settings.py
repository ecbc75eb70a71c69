"""List of all settings: path, value, description, range.

    python train.py --list-settings --preset cpu
    python tools/list_settings.py --markdown              tables for docs/settings.md

The declarations are in `config/setting_groups.py` and `config/settings.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.catalog import names_of, setting_paths
from config.command_line import Parser, add_settings, run_cli
from config.optimizer_defaults import OPTIMIZER_PARAMS
from config.settings import Settings, declared_settings, resolve

SECTIONS = {  # heading of each group in the Markdown page
    "": "Run and engine",
    "optimizer": "Optimizer",
    "bf16": "Precision",
    "zero_optimization": "ZeRO",
    "model": "Network",
    "augmentation": "Augmentation",
    "schedule": "Learning-rate schedule",
    "resizing": "Progressive resizing",
    "loss": "Loss",
    "ema": "Exponential moving average (EMA)",
    "parallel": "Strategies",
}


def list_settings(preset: str | None, overrides: list[str]) -> int:
    """Print path, value and description of every setting, as `python train.py --list-settings` does."""
    settings = resolve(preset, overrides)
    tree = _tree(settings)
    group = None
    for path in _sorted_paths(settings):
        head = path.partition(".")[0] if "." in path else ""
        if head != group:
            print(f"\n{head or 'the whole run'}")
            group = head
        if path.endswith("_options"):
            chosen = ", ".join(f"{name}={_shown(option)}" for name, option in _value(tree, path).items())
            path, value, description = f"{path}.NAME", chosen, _description(path)
        else:
            value, description = _shown(_value(tree, path)), _description(path)
            if allowed := _allowed(path):
                description += f" ({allowed})"
        print(f"  {path:42} {value:16} {description}".rstrip())
    return 0


def markdown(preset: str | None, overrides: list[str]) -> str:
    """Return one Markdown table per group: setting, default, range or choices, description."""
    settings = resolve(preset, overrides)
    tree = _tree(settings)
    for params in OPTIMIZER_PARAMS.values():  # parameters of the other optimizers, with the first default there is
        for name, value in params.items():
            tree["optimizer"]["params"].setdefault(name, value)
    lines: list[str] = []
    group = None
    paths = [*setting_paths(settings), *(path for path in setting_paths() if path not in setting_paths(settings))]
    order = list(SECTIONS)
    heads = {path: path.partition(".")[0] if "." in path else "" for path in paths}
    for path in sorted(paths, key=lambda path: order.index(heads[path]) if heads[path] in order else len(order)):
        head = heads[path]
        if head != group:
            lines += [
                *([""] if lines else []), f"## {SECTIONS.get(head, head)}", "",
                "| setting | default | values | description |", "|---|---|---|---|",
            ]  # fmt: skip
            group = head
        value = _value(tree, path)
        if path.endswith("_options"):
            shown = ", ".join(f"{name}={_shown(option)}" for name, option in value.items())
            path = f"{path}.NAME"
        else:
            shown = _shown(value)
        allowed = _allowed(path).replace("|", "\\|")
        lines.append(f"| `{path}` | {f'`{shown}`' if shown else ''} | {allowed} | {_description(path)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = Parser(
        "python tools/list_settings.py",
        "Print every setting with its value, range and description.",
        example="python tools/list_settings.py --markdown",
    )
    add_settings(parser)
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables, as docs/settings.md has them")
    args = parser.parse_args()
    if args.markdown:
        print(markdown(args.preset, args.set), end="")
        return 0
    return list_settings(args.preset, args.set)


def _tree(settings: Settings) -> dict[str, Any]:
    tree: dict[str, Any] = settings.as_dict()
    return tree | tree.pop("engine")


def _sorted_paths(settings: Settings) -> list[str]:
    return sorted(setting_paths(settings), key=lambda path: "." in path)  # settings without a group first


def _description(path: str) -> str:
    declared = declared_settings().get(path.removesuffix(".NAME"))
    return declared.description if declared else ""


def _allowed(path: str) -> str:
    """Range or choices of a setting; empty where every value of its type is allowed."""
    declared = declared_settings().get(path)
    if declared is None:
        return ""
    return declared.condition() or ", ".join(names_of(path))


def _value(tree: Any, path: str) -> Any:
    """The value at a path; None for an option that the chosen part does not have."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _shown(value: Any) -> str:
    """A value as one would type it after `--set path=`."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(run_cli(main))
