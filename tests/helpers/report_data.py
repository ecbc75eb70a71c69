"""What the tests of reports share: data of figures, changed runs, and a check that a page needs no other file."""

from __future__ import annotations

import base64
import random
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from benchmarks.run_index import write_run
from config.settings import resolve
from records.run_data import RunData
from records.run_folder import RunFolder
from reports.cifar100_superclasses import SUPERCLASSES

CIFAR_100 = sorted(name for members in SUPERCLASSES.values() for name in members)


def add_run(folder: Path, seed: int = 0, best: float = 0.5, epochs: int = 3, **model: object) -> Path:
    """Write a made-up run with these settings of the model."""
    settings = resolve("cpu", []).as_dict()
    settings["model"].update(model)
    write_run(folder, settings, seed, ["cat", "dog"], best, epochs, 5, random.Random(seed))
    return folder


def writable_copy(run: RunFolder, folder: Path) -> RunFolder:
    """Copy a finished run, without its checkpoints and its page."""
    return RunFolder(Path(shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("state", "report.html"))))


def drawn(axes) -> dict[str, tuple[list[float], list[float]]]:
    """Return label -> x and y values of each line."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def with_metrics(run: RunData, **columns: list[float]) -> RunData:
    """Return the run with further columns in its metrics."""
    metrics = [
        {**line, **{key: values[i] for key, values in columns.items() if values[i] is not None}}
        for i, line in enumerate(run.metrics)
    ]
    return replace(run, metrics=metrics)


def some_confusion(num_classes: int, seed: int = 0) -> np.ndarray:
    matrix = np.random.default_rng(seed).integers(0, 4, (num_classes, num_classes))
    return matrix + 20 * np.eye(num_classes, dtype=matrix.dtype)


class References(HTMLParser):
    """The tags and every reference that a browser would fetch or follow."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.tags = [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [
            value for name, value in attributes if name in ("src", "href", "srcset", "data", "action", "poster")
        ]


def assert_stands_alone(text: str, folder: Path) -> None:
    found = References(text)
    assert not found.tags & {"script", "link", "iframe", "object", "embed"}
    for reference in found.found:
        assert reference.startswith(("data:image/svg+xml;base64,", "#")) or (folder / reference).exists(), reference
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    for encoded in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text):
        svg = base64.b64decode(encoded).decode()
        assert not re.findall(r'(?:href|src)="(?!#|data:)', svg) and "<script" not in svg and "url(http" not in svg
    anchors = {reference[1:] for reference in found.found if reference.startswith("#")}
    assert anchors and all(f'id="{anchor}"' in text for anchor in anchors)
