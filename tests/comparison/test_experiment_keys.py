"""comparison/experiment_keys.py: borders of the numbers in an experiment file; test_compare.py has the sentences."""

from __future__ import annotations

import pytest
from comparisons import COMMON, VARIANTS

from common.errors import SettingsError
from comparison.experiment_file import read


def test_a_part_of_a_file_that_is_not_there_is_named_with_the_experiment(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(COMMON + VARIANTS.replace('"geglu"', '"gone.py:Gate"'))
    with pytest.raises(SettingsError, match=r"own.toml: gone.py:Gate: there is no file .*gone.py"):
        read(file)


@pytest.mark.parametrize(("seeds", "fits"), [(0, False), (1, True), (1000, True), (1001, False)])
def test_an_experiment_has_1_to_1000_seeds(tmp_path, seeds, fits):
    file = tmp_path / "many.toml"
    text = COMMON.replace("tiny.toml", "cpu-quick").replace("seeds = 2", f"seeds = {seeds}")
    file.write_text(text + VARIANTS)
    if fits:
        assert read(file).seeds == seeds
    else:
        with pytest.raises(SettingsError, match=f"seeds must lie between 1 and 1000, not {seeds}"):
            read(file)
