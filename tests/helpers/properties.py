"""Settings of the property-based tests (Hypothesis): the same examples each time, none kept, no timing.

@some_examples(50)
@given(st.text())
def test_...(text):
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from common.paths import PROJECT

set_hypothesis_home_dir(str(PROJECT / ".pytest_cache" / "hypothesis"))  # its tables of characters, out of the tree


def some_examples(count: int) -> settings:
    """Return the decorator of a test that is run on `count` examples."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],  # machines that are busy
    )
