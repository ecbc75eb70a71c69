"""What there is to choose from, before anything is trained.

    python model.py                                            # every part that has a name
    python model.py --preset cpu --set model.depth=6           # layers and parameters of one network
    python settings.py --preset cpu                            # every setting: its path, its value, what it means
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from command_line import TABLES, Parser, at_least_one, names_of, setting_paths
from settings import HERE, preset_names, resolve

# What stands neither in a comment of settings.py nor in a table.
MEANINGS = {
    "epochs": "passes over the training split",
    "train_batch_size": "images of one optimiser step, over all processes",
    "gradient_accumulation_steps": "parts that a process cuts its share of the batch into, one after the other",
    "gradient_clipping": "largest norm of the gradient; 0: no clipping",
    "optimizer.type": "AdamW, Adam, SGD, ...: a name of optimizers.py",
    "optimizer.params.lr": "learning rate at its highest",
    "optimizer.params.betas": "decay of the means of gradient and square",
    "optimizer.params.eps": "added to the root of the mean square",
    "optimizer.params.momentum": "decay of the mean of the gradient",
    "optimizer.params.nesterov": "step from where the momentum leads",
    "optimizer.params.matrix_lr_factor": "of the rate, for the matrices that Muon trains",
    "optimizer.params.weight_decay": "of matrices and filters; biases, norms, positions and class tokens have none",
    "bf16.enabled": "compute in bfloat16, keep fp32 weights; autocast: zero too; auto: where the device is faster",
    "zero_optimization.stage": "what the processes share: 0 nothing, 1 optimiser states, 2 and gradients, 3 and weights",
    "zero_optimization.offload_optimizer.device": "none, or cpu: where the optimiser's states live",
}


def describe_model() -> None:
    """What `python model.py` does."""
    parser = Parser("python model.py", "List the tables of parts, or describe one network.",
                    example="python model.py --preset cpu --set model.feed_forward=geglu")
    add_settings(parser)
    parser.add_argument("--classes", type=at_least_one, default=100, metavar="K", help="number of classes (default: 100)")
    parser.add_argument("--image-side", type=at_least_one, default=32, metavar="S", help="pixels along one side of an image (default: 32)")
    parser.add_argument("--groups", action="store_true", help="show which parameters the optimiser treats alike, and how")
    args = parser.parse_args()
    from model import build_model, count_parameters

    if args.preset is None and not args.set and not args.groups:
        list_parts()
        return
    settings = resolve(args.preset, args.set)
    model = build_model(settings.model, args.classes, args.image_side)
    if args.groups:
        from optimizers import describe_groups

        print(describe_groups(settings.engine["optimizer"], model))
        return
    for i, layer in enumerate(model):
        print(f"{i:3} {type(layer).__name__:10} {count_parameters(layer):>12,} parameters")
    print(f"    {'total':10} {count_parameters(model):>12,} parameters")


def list_parts() -> None:
    """Every table with its entries, their first lines and options."""
    from model import TABLES
    from parts import part_options

    for kind, table in TABLES.items():
        print(f"\nmodel.{kind}")
        for name, part in table.items():
            options = ", ".join(f"{k}={v!r}" for k, v in part_options(part).items()) if kind not in ("architecture", "block") else ""
            print(f"  {name:12} {(part.__doc__ or '').splitlines()[0]}" + (f"  [{options}]" if options else ""))


def describe_settings() -> None:
    """What `python settings.py` does."""
    parser = Parser("python settings.py", "List every setting that --set takes: path, value, meaning.",
                    example="python settings.py --preset cpu")
    add_settings(parser)
    args = parser.parse_args()
    settings = resolve(args.preset, args.set)
    tree: dict[str, Any] = settings.as_dict()
    tree |= tree.pop("engine")
    meanings = MEANINGS | comments() | {path: ", ".join(names_of(path)) for path in TABLES}
    group = None
    for path in sorted(setting_paths(settings), key=lambda path: "." in path):  # those without a group first
        head = path.partition(".")[0] if "." in path else ""
        if head != group:
            print(f"\n{head or 'the whole run'}")
            group = head
        if path.endswith("_options"):
            chosen = ", ".join(f"{name}={_shown(option)}" for name, option in _value(tree, path).items())
            path, value, meaning = f"{path}.NAME", chosen, "options of that part: python model.py lists them"
        else:
            value, meaning = _shown(_value(tree, path)), meanings.get(path, "")
        print(f"  {path:42} {value:16} {meaning}".rstrip())


def _value(tree: Any, path: str) -> Any:
    """The value at a path; None for an option that the chosen part does not have."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _shown(value: Any) -> str:
    """A value as one would type it after `--set path=`."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else "-" if value is None else str(value)


def comments() -> dict[str, str]:
    """The comment that stands behind each field of the classes in settings.py, by the path of the setting."""
    found, group = {}, ""
    for line in (HERE / "settings.py").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"class (\w+?)(Settings)?:", line):
            group = f"{match[1].lower()}." if match[2] else ""  # ModelSettings are the group `model`, Settings the whole
        elif match := re.match(r"    (\w+): .*?  # (.*)", line):
            found[f"{group}{match[1]}"] = match[2]
    return found


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options --preset and --set."""
    parser.add_argument("--preset", metavar="NAME", help=f"start from it: {', '.join(preset_names())}, or a .toml file (default: none)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a setting: model.width=192; repeat for more")
