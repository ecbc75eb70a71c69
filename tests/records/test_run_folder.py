"""records/run_folder.py: what a new run starts from; its locks and files are tested with the runs of test_train.py."""

from __future__ import annotations

import dataclasses
import json

from records.run_folder import Progress, RunFolder


def test_a_new_run_has_counted_nothing():
    """Sums and counters of an epoch begin at zero; no accuracy is below the first one that is measured."""
    found = dataclasses.asdict(Progress())
    assert found.pop("best_accuracy") == -1.0
    assert not any(found.values()), found


def test_the_progress_of_an_earlier_commit_is_read(tmp_path):
    """It also held what follows from the best step."""
    values = {**dataclasses.asdict(Progress(epoch=3, best_step=8)), "epochs_without_better": 1}
    (tmp_path / "progress.json").write_text(json.dumps(values))
    assert RunFolder.read_progress(tmp_path) == Progress(epoch=3, best_step=8)
