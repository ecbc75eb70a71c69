"""Command line of `python model.py`: list the component registries, or the layers and parameters of one network."""

from __future__ import annotations

import sys

from config.command_line import Parser, add_settings, at_least_one
from config.settings import resolve


def describe_model() -> None:
    """Run `python model.py`."""
    parser = Parser(
        "python model.py",
        "List the component registries, or describe one network.",
        example="python model.py --preset cpu --set model.feed_forward=geglu",
    )
    add_settings(parser)
    parser.add_argument("--classes", type=at_least_one, metavar="K", help="number of classes (default: 100)")
    parser.add_argument(
        "--image-side",
        type=at_least_one,
        metavar="S",
        help="pixels along one side of an image (default: image_side of the settings, or else 32)",
    )
    parser.add_argument(
        "--groups", action="store_true", help="show the parameter groups: optimizer, learning rate, weight decay"
    )
    args = parser.parse_args()
    from model import build_model  # after the arguments: it imports PyTorch
    from models.cost import count_parameters
    from training.own_part_checks import check_own_parts
    from training.run_setup import check_parts

    if not any(vars(args).values()):
        list_parts()
        return
    settings = resolve(args.preset, args.set)
    check_parts(settings)
    num_classes, side = args.classes or 100, args.image_side or settings.image_side or 32
    for text in check_own_parts(settings, num_classes, side):
        print(f"warning: {text}", file=sys.stderr)
    model = build_model(settings.model, num_classes, side)
    if args.groups:
        from optim.optimizers import describe_groups

        print(describe_groups(settings.engine["optimizer"], model))
        return
    for i, layer in enumerate(model):
        print(f"{i:3} {type(layer).__name__:10} {count_parameters(layer):>12,} parameters")
    print(f"    {'total':10} {count_parameters(model):>12,} parameters")


def list_parts() -> None:
    """Print every registry: its entries, their first docstring lines and their options."""
    from model import TABLES
    from models.parts import part_options

    for kind, table in TABLES.items():
        print(f"\nmodel.{kind}")
        for name, part in table.items():
            options = (
                ", ".join(f"{k}={v!r}" for k, v in part_options(part).items())
                if kind not in ("architecture", "block")
                else ""
            )
            first_line = (part.__doc__ or "").partition("\n")[0]
            print(f"  {name:12} {first_line}" + (f"  [{options}]" if options else ""))
    print("\nEach of these settings also takes a class or a function of your own, FILE.py:NAME (docs/own-parts.md).")
