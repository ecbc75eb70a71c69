"""A picture of what the network will see: `python dali_pipeline.py --preview grid.png`.

Each row is a training image as it is, then as some epochs will show it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common.paths import DATA
from config.command_line import Parser, at_least_one
from config.settings import preset_names, resolve
from image_data.dataset import Dataset


def main() -> None:
    args = parse_arguments()
    settings = resolve(args.preset, args.set)
    dataset = Dataset.open(args.data_dir)
    from dali_pipeline import preview
    from reports.images import image_grid
    from reports.style import save

    grid = preview(dataset, settings.augmentation, settings.image_side, args.images, args.epochs, args.seed, args.source)
    save(image_grid(grid, f"{args.data_dir.name}: original, then {args.epochs} augmentations"), args.preview)
    print(f"wrote {args.preview}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser("python dali_pipeline.py", "Draw a grid of augmented training images, as the network will see them.",
                    example="python dali_pipeline.py --preview grid.png --set augmentation.policy=rand_augment")
    parser.add_argument("--preview", type=Path, required=True, metavar="FILE", help="picture to write, .png or .svg (must be given)")
    parser.add_argument("--data-dir", type=Path, default=DATA / "cifar100", metavar="DIR", help="prepared dataset (default: data/cifar100)")
    parser.add_argument("--preset", metavar="NAME", help=f"settings to start from: {', '.join(preset_names())}, or a .toml file (default: none)")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="override a setting: augmentation.flip=0; repeat for more")
    parser.add_argument("--source", default="auto", choices=["auto", "resident", "files", "tensor"],
                        help="packed pixels through DALI, files through DALI, packed pixels through PyTorch (default: auto)")
    parser.add_argument("--images", type=at_least_one, default=16, metavar="N", help="different images, each a row (default: 16)")
    parser.add_argument("--epochs", type=at_least_one, default=12, metavar="N", help="versions of each, the columns after the original (default: 12)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of order and augmentation (default: 0)")
    return parser.parse_args()
