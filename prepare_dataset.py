# PYTHON_ARGCOMPLETE_OK
"""Archive, download or image tree -> the files that training reads (see image_data/dataset.py for what they are).

    python prepare_dataset.py                                                   # CIFAR-100 into data/cifar100
    python prepare_dataset.py --data-dir data/pets --archive pets.zip           # a zip or tar of {train,test}/<class>/*.png
    python prepare_dataset.py --root /big/disk/imagenet --data-dir data/imagenet

In: one of --dataset, --archive, --root. Out: labels.txt, the two file lists, packed/*.npy (when all images share one square
size) and, last of all, dataset.json. The same images give byte-identical files on every machine, for any number of workers.
Everything is made in <data-dir>/.partial and moved into place when whole, so a killed run leaves nothing half-made.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from config.command_line import Parser
from image_data.preparation.downloads import SOURCES
from image_data.preparation.image_tree import PrepareError
from image_data.preparation.prepare import PACK_LIMIT_GIB, prepare


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        "python prepare_dataset.py",
        "Archive, download or image tree -> label files, channel statistics and packed arrays for training.",
        example="python prepare_dataset.py --data-dir data/pets --archive pets.zip",
        notes="A tree is {train,test}/<class>/*.png; class folders may be nested; val or validation stands in for a missing test.",
    )
    where = parser.add_argument_group("where the images come from (at most one)")
    source = where.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset",
        choices=tuple(SOURCES),
        help="download CIFAR-100 or CIFAR-10, or draw ten simple shapes without a network (default: cifar100)",
    )
    source.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help="zip or tar of a tree, or an original cifar-10-python.tar.gz or cifar-100-python.tar.gz (default: download)",
    )
    source.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help="a tree that lies on the disk; it stays where it is (default: download)",
    )
    out = parser.add_argument_group("what is written")
    out.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder to write to (default: data/<dataset>, data/<archive's name>, or --root)",
    )
    out.add_argument(
        "--pack-limit-gib",
        type=float,
        default=PACK_LIMIT_GIB,
        metavar="GIB",
        help="pack the pixels into arrays up to this size, 0 never (default: %(default)g)",
    )
    out.add_argument(
        "--skip-broken", action="store_true", help="leave out images that cannot be decoded (default: refuse)"
    )
    out.add_argument("--force", action="store_true", help="redo a folder that is prepared already")
    how = parser.add_argument_group("how")
    how.add_argument("--workers", type=int, metavar="N", help="decoding processes (default: one per available core)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    try:
        prepare(**vars(parse_arguments(arguments)))
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing half-made was left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
