"""A prepared dataset of random pixels with the sizes of CIFAR-100, for measurements where the content does not matter.

python benchmarks/lib/noise_dataset.py FOLDER [--images N]        two seconds; packed pixels, no image files
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.lib.options import output_folder
from config.command_line import Parser, at_least_one
from image_data.dataset import LIST_FILES

CLASSES, SIDE, SEED = 100, 32, 0


def write(folder: Path, num_train: int = 50_000) -> None:
    """Write the dataset; the test split has a fifth of the training images."""
    counts, rng = {"train": num_train, "test": max(1, num_train // 5)}, np.random.default_rng(SEED)
    (folder / "packed").mkdir(parents=True, exist_ok=True)
    for name, count in counts.items():
        np.save(folder / "packed" / f"{name}.npy", rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8))
        lines = (f"{name}/{i % CLASSES:03d}/{i:06d}.png\t{i % CLASSES}\n" for i in range(count))
        (folder / LIST_FILES[name]).write_text("".join(lines))
    (folder / "labels.txt").write_text("".join(f"{i:03d}\n" for i in range(CLASSES)))
    facts = {
        "fingerprint": "sha256:" + "0" * 64,
        "format": 1,
        "image_side": SIDE,
        "mean": [0.5] * 3,
        "std": [0.289] * 3,  # of a uniform distribution on [0, 1]
        "num_classes": CLASSES,
        "num_images": counts,
        "packed": True,
        "root": "images",
    }
    (folder / "dataset.json").write_text(json.dumps(facts))  # last: with it the dataset counts as prepared


def main() -> None:
    parser = Parser(
        "python benchmarks/lib/noise_dataset.py FOLDER",
        "Write a prepared dataset of random pixels with the sizes of CIFAR-100.",
        example="python benchmarks/lib/noise_dataset.py runs/noise --images 2000",
    )
    parser.add_argument("folder", type=output_folder, metavar="FOLDER", help="output folder")
    parser.add_argument(
        "--images", type=at_least_one, default=50_000, metavar="N", help="training images (default: %(default)s)"
    )
    args = parser.parse_args()
    write(args.folder, args.images)


if __name__ == "__main__":
    main()
