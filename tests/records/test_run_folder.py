"""records/run_folder.py: what a new run starts from; its locks and files are tested with the runs of test_train.py."""

from __future__ import annotations

import dataclasses

from records.run_folder import Progress


def test_a_new_run_has_counted_nothing():
    """Sums and counters of an epoch begin at zero; no accuracy is below the first one that is measured."""
    found = dataclasses.asdict(Progress())
    assert found.pop("best_accuracy") == -1.0
    assert not any(found.values()), found
