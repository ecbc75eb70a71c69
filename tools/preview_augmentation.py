"""A picture of what the network will see: `python dali_pipeline.py --preview grid.png`.

Each row is a training image as it is, then as some epochs will show it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.paths import DATA
from config.catalog import SOURCES
from config.command_line import Parser, at_least_one
from config.settings import AugmentationSettings, preset_names, resolve
from image_data.augmentation import epoch_order
from image_data.dataset import Dataset


def main() -> None:
    args = parse_arguments()
    settings = resolve(args.preset, args.set)
    dataset = Dataset.open(args.data_dir)
    from reports.images import image_grid
    from reports.style import save

    grid = preview(
        dataset, settings.augmentation, settings.image_side, args.images, args.epochs, args.seed, args.source
    )
    save(image_grid(grid, f"{args.data_dir.name}: original, then {args.epochs} augmentations"), args.preview)
    print(f"wrote {args.preview}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python dali_pipeline.py",
        "Draw a grid of augmented training images, as the network will see them.",
        example="python dali_pipeline.py --preview grid.png --set augmentation.policy=rand_augment",
    )
    parser.add_argument(
        "--preview", type=Path, required=True, metavar="FILE", help="picture to write, .png or .svg (must be given)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=DATA / "cifar100",
        metavar="DIR",
        help="prepared dataset (default: data/cifar100)",
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help=f"settings to start from: {', '.join(preset_names())}, or a .toml file (default: none)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="override a setting: augmentation.flip=0; repeat for more",
    )
    parser.add_argument(
        "--source",
        default="auto",
        choices=SOURCES,
        help="packed pixels through DALI, files through DALI, packed pixels through PyTorch (default: auto)",
    )
    parser.add_argument(
        "--images", type=at_least_one, default=16, metavar="N", help="different images, each a row (default: 16)"
    )
    parser.add_argument(
        "--epochs",
        type=at_least_one,
        default=12,
        metavar="N",
        help="versions of each, the columns after the original (default: 12)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of order and augmentation (default: 0)")
    return parser.parse_args()


def preview(
    dataset: Dataset,
    augmentation: AugmentationSettings,
    image_side: int,
    count: int,
    epochs: int,
    seed: int,
    source: str,
) -> np.ndarray:
    """A grid of uint8 pixels (rows, columns, S, S, 3): `count` images, each as it is and as `epochs` epochs show it."""
    import torch  # not with the file, so that --help answers at once

    from dali_pipeline import Batches
    from image_data.pixels import denormalize

    train = dataset.splits["train"]
    rows = np.linspace(0, len(train) - 1, count).astype(np.int64)
    few = replace(dataset, splits={"train": train.take(rows)})
    common = dict(batch_size=count, source=source, image_side=image_side)
    columns = [next(iter(Batches(few, "train", **common).epoch()))[0]]
    training = Batches(few, "train", seed=seed, augmentation=replace(augmentation, repeats=1), **common)
    for epoch in range(epochs):
        images = next(iter(training.epoch(epoch)))[0]
        columns.append(images[torch.from_numpy(np.argsort(epoch_order(seed, epoch, count)))])
    return denormalize(torch.stack(columns, dim=1), dataset.mean, dataset.std)
