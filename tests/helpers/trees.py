"""Small image trees and archives for the tests of prepare_dataset.py, and its error messages.

The fixtures `tree` and `zipped` in conftest.py use them.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from prepare_dataset import main

WRITTEN = (
    "dataset.json",
    "labels.txt",
    "training_file_list.txt",
    "test_file_list.txt",
    "packed/train.npy",
    "packed/test.npy",
)


def noise(seed: int, side: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def tree_files(classes=("cat", "big dog"), train=3, test=2) -> dict[str, np.ndarray]:
    """Return relative path -> pixels; all images differ."""
    names = [
        f"{split}/{name}/image {i}.png"
        for split, count in (("train", train), ("test", test))
        for name in classes
        for i in range(count)
    ]
    return {name: noise(seed) for seed, name in enumerate(names)}


def written(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in WRITTEN if (folder / name).exists()}


def refusal(capsys, *arguments: object) -> str:
    """Run the command, which must fail without a traceback, and return its error message."""
    assert main([str(argument) for argument in arguments]) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return next(line for line in message.splitlines() if line.startswith("error: "))


def member(name: str, **attributes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def python_archive(path: Path, which: int, extra: dict[str, bytes] | None = None) -> dict[str, np.ndarray]:
    """Write a miniature cifar-<which>-python.tar.gz, pickled like the original (protocol 2, str keys).

    Returns path -> pixels of its images.
    """
    folder = {10: "cifar-10-batches-py", 100: "cifar-100-python"}[which]
    batches = {
        10: {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
        100: {"train": ["train"], "test": ["test"]},
    }
    classes = ["plane", "apple_tree"]
    key, names_key, meta = (
        ("labels", "label_names", "batches.meta") if which == 10 else ("fine_labels", "fine_label_names", "meta")
    )
    files, images, seed = {meta: pickle.dumps({names_key: classes, "num_vis": 3072}, protocol=2)}, {}, 0
    for split, names in batches[which].items():
        for name in names:
            pixels = np.stack([noise(seed + i, 32) for i in range(4)])
            filenames = [
                f"{'st._david' if label else 'p'}'s_s_{seed + i:06d}.png" for i, label in enumerate((0, 1, 0, 1))
            ]
            images |= {f"{split}/{classes[i % 2]}/{filenames[i]}": pixels[i] for i in range(4)}
            rows = pixels.transpose(0, 3, 1, 2).reshape(4, 3072)
            files[name] = pickle.dumps({"data": rows, key: [0, 1, 0, 1], "filenames": filenames}, protocol=2)
            seed += 4
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (files | (extra or {})).items():
            archive.addfile(member(f"{folder}/{name}", size=len(data)), io.BytesIO(data))
    return images
