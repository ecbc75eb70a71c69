"""Preview of the augmentation: `python dali_pipeline.py --preview grid.png`.

Each row shows a training image and then its augmented versions of several epochs.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.output_files import check_output_file, check_picture_suffix
from common.paths import DATA, name_of
from config.catalog import SOURCES
from config.command_line import Parser, add_settings, at_least_one
from config.settings import AugmentationSettings, resolve
from image_data.augmentation import epoch_order
from image_data.dataset import Dataset
from training.argument_types import seed


def main() -> None:
    args = parse_arguments()
    check_picture_suffix(args.preview, "--preview")
    check_output_file(args.preview, "--preview")
    settings = resolve(args.preset, args.set)
    dataset = Dataset.open(args.data_dir)
    from reports.images import image_grid
    from reports.style import save

    grid = preview(
        dataset, settings.augmentation, settings.image_side, args.images, args.epochs, args.seed, args.source
    )
    save(image_grid(grid, f"{name_of(args.data_dir)}: original, then {args.epochs} augmentations"), args.preview)
    print(f"wrote {args.preview}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        "python dali_pipeline.py",
        "Draw a grid of augmented training images, as the network gets them.",
        example="python dali_pipeline.py --preview grid.png --set augmentation.policy=rand_augment",
    )
    parser.add_argument(
        "--preview", type=Path, required=True, metavar="FILE", help="picture to write, .png or .svg; must be given"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=DATA / "cifar100",
        metavar="DIR",
        help="prepared dataset (default: data/cifar100)",
    )
    add_settings(parser, example="augmentation.flip=0")
    parser.add_argument(
        "--source",
        default="auto",
        choices=SOURCES,
        help="input pipeline: resident (packed pixels, DALI), files (DALI) or tensor (packed pixels, PyTorch)"
        " (default: auto)",
    )
    parser.add_argument(
        "--images", type=at_least_one, default=16, metavar="N", help="number of images, one per row (default: 16)"
    )
    parser.add_argument(
        "--epochs",
        type=at_least_one,
        default=12,
        metavar="N",
        help="number of epochs, one column each after the original (default: 12)",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="random seed of data order and augmentation (default: 0)"
    )
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
    """Return `count` images and their versions of `epochs` epochs: uint8 (count, 1 + epochs, S, S, 3)."""
    import torch  # imported here, so that --help answers at once

    from dali_pipeline import Batches
    from image_data.pixels import denormalize
    from reports.predictions import load_images

    train = dataset.splits["train"]
    rows = np.linspace(0, len(train) - 1, count).astype(np.int64)
    few = replace(dataset, splits={"train": train.take(rows)})
    common: dict[str, Any] = dict(source=source, image_side=image_side)
    columns = [load_images(dataset, "train", rows, **common)]
    augmentation = replace(augmentation, repeats=1)
    with closing(Batches(few, "train", count, seed=seed, augmentation=augmentation, **common)) as training:
        for epoch in range(epochs):
            images = next(iter(training.epoch(epoch)))[0]
            columns.append(images[torch.from_numpy(np.argsort(epoch_order(seed, epoch, count)))])
    return denormalize(torch.stack(columns, dim=1), dataset.mean, dataset.std)
