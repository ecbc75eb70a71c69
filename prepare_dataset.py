# PYTHON_ARGCOMPLETE_OK
"""Prepare a dataset: archive, download or image tree -> the files that training reads (see image_data/dataset.py).

    python prepare_dataset.py                                                   # CIFAR-100 into data/cifar100
    python prepare_dataset.py --data-dir data/pets --archive pets.zip           # zip or tar: {train,test}/<class>/*.png
    python prepare_dataset.py --root photos --test-fraction 0.2                 # splits class folders <class>/*.png
    python prepare_dataset.py --root /big/disk/imagenet --data-dir data/imagenet

It writes labels.txt, two file lists, packed/*.npy (if all images have one square size) and, last, dataset.json. The
same images give byte-identical files on every machine and for any number of workers. Files are written to
<data-dir>/.partial and moved into place when complete, so a killed run leaves no incomplete dataset.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.display import protect_streams
from common.errors import EXIT_INTERRUPTED, UserError
from config.command_line import Parser
from image_data.image_file import MAX_MEGAPIXELS
from image_data.preparation.downloads import SOURCES
from image_data.preparation.prepare import PACK_LIMIT_GIB, prepare


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        "python prepare_dataset.py",
        "Prepare an archive, a download or an image tree for training.",
        example="python prepare_dataset.py --data-dir data/pets --archive pets.zip",
        notes="An image tree is {train,test}/<class>/*.png. Class folders may be nested. val can replace test.",
    )
    where = parser.add_argument_group("source of the images (at most one)")
    source = where.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset",
        choices=tuple(SOURCES),
        help="named dataset: a download, or ten drawn shapes, which need no network "
        "(default: the recorded source of --data-dir, else cifar100)",
    )
    source.add_argument(
        "--archive",
        type=Path,
        metavar="FILE",
        help="zip or tar of an image tree, or cifar-10-python.tar.gz or cifar-100-python.tar.gz (default: download)",
    )
    source.add_argument(
        "--root", type=Path, metavar="DIR", help="image tree on disk, which is read in place (default: download)"
    )
    where.add_argument(
        "--test-fraction",
        type=float,
        metavar="SHARE",
        help="share of each class for the test split of a tree without one, chosen by file name (default: none)",
    )
    where.add_argument(
        "--max-megapixels",
        type=float,
        default=MAX_MEGAPIXELS,
        metavar="N",
        help="largest image to decode; larger ones count as broken (default: %(default)g)",
    )
    where.add_argument(
        "--unpack-limit-gib",
        type=float,
        metavar="GIB",
        help="largest unpacked size of an archive (default: 100 times its size, at least 0.25)",
    )
    out = parser.add_argument_group("output")
    out.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder to write to (default: data/<dataset>, data/<name of the archive>, or --root)",
    )
    out.add_argument(
        "--pack-limit-gib",
        type=float,
        default=PACK_LIMIT_GIB,
        metavar="GIB",
        help="largest size of the packed pixel arrays; 0 disables packing (default: %(default)g)",
    )
    out.add_argument(
        "--skip-broken", action="store_true", help="skip images that cannot be decoded (default: stop with an error)"
    )
    out.add_argument("--force", action="store_true", help="prepare again a folder that is already prepared")
    how = parser.add_argument_group("speed")
    how.add_argument(
        "--workers", type=int, metavar="N", help="number of decoding processes (default: one per available core)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    protect_streams()
    try:
        prepare(**vars(parse_arguments(arguments)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; no incomplete dataset was left", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
