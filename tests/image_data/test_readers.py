"""image_data/readers.py: image sizes after EXIF orientation, as the decoders apply it, and packed images of a split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from image_data.readers import FileReader, PaddedPackedReader


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_after_exif_orientation(tmp_path, orientation):
    """The file stores 8 x 4 pixels; orientations 5 to 8 rotate them by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    sizes = FileReader([tmp_path / "a.jpg"], 1, tmp_path).sizes(np.array([0]))
    assert sizes.tolist() == ([[8, 4]] if orientation >= 5 else [[4, 8]])


def test_a_split_holds_its_own_images_alone():
    """A validation split is a few rows of the packed training images."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)
    rows = np.array([7, 2, 9])
    reader = PaddedPackedReader(pixels, rows, torch.device("cpu"), padding=1)
    assert len(reader.windows) == 3
    crops = reader.read_crops(np.array([2, 0]), None)
    np.testing.assert_array_equal(crops.permute(0, 2, 3, 1), pixels[[9, 7]])
