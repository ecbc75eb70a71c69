"""Fixtures of the tests of reports/."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import report
from reports.pictures import SplitAnalysis


@pytest.fixture(scope="session")
def analysis(done, shapes) -> SplitAnalysis:
    """The predictions of its network on the test split."""
    args = SimpleNamespace(split=None, data_dir=shapes, weights=None, batch_size=16, source=None, out=None)
    return report.analyze(done, args)
