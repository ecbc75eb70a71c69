"""The example of the README, and the tables that are generated into the pages. Commands: test_documentation.py."""

from __future__ import annotations

import re

import pytest

from common.paths import PROJECT
from models import feed_forward as feed_forward
from tools.update_docs import PAGES, table, update

README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_example_of_a_feed_forward_works():
    """The class in the README runs unchanged."""
    import torch

    code = re.search(r"```python\n(class SquaredReLU.*?)\n\n\nFEED_FORWARDS", README, re.DOTALL)[1]
    scope = dict(vars(feed_forward))
    exec(code, scope)
    from models.parts import Dimensions

    dims = Dimensions(10, 32, 4, width=16, depth=1, heads=2, head_size=8, num_prefix=0, dropout=0.0)
    assert scope["SquaredReLU"](dims, hidden=24)(torch.randn(2, 64, 16)).shape == (2, 64, 16)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert update(text) == text, "run: python tools/update_docs.py"


def test_a_new_entry_is_in_the_table(monkeypatch):
    class Mine(feed_forward.MLP):
        """Something new."""

    monkeypatch.setitem(feed_forward.FEED_FORWARDS, "mine", Mine)
    row, page = "| `mine` | Something new. | `hidden=0` |", PROJECT / "docs" / "architectures.md"
    assert row in table("feed_forward") and row in update(page.read_text(encoding="utf-8"))
