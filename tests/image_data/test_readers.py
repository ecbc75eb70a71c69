"""image_data/readers.py: image sizes after EXIF orientation, as the decoders apply it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from image_data.readers import FileReader


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_after_exif_orientation(tmp_path, orientation):
    """The file stores 8 x 4 pixels; orientations 5 to 8 rotate them by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    sizes = FileReader([tmp_path / "a.jpg"], 1, tmp_path).sizes(np.array([0]))
    assert sizes.tolist() == ([[8, 4]] if orientation >= 5 else [[4, 8]])
