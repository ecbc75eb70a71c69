"""tools/describe_model.py: the network that `python model.py` describes is the one that a run would train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from common.errors import SettingsError
from model import TABLES
from tools.describe_model import describe_model

SMALL = [f"--set=model.{change}" for change in ("width=16", "depth=1", "heads=2", "head_size=8", "patch=8")]


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., list[str]]:
    """The lines that `python model.py` prints."""

    def describe(*words: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["model.py", *words])
        describe_model()
        return capsys.readouterr().out.splitlines()

    return describe


def test_the_image_side_is_that_of_the_option_or_else_of_the_settings(described):
    total = partial(described, *SMALL)
    at_64 = total("--image-side=64")
    assert total("--set=image_side=64") == at_64 != total()
    assert total("--set=image_side=128", "--image-side=64") == at_64


def test_every_option_describes_a_network_and_none_lists_the_registries(described, monkeypatch):
    monkeypatch.setitem(TABLES["pooling"], "undocumented", lambda dims: None)
    listed = described()
    assert "model.feed_forward" in listed and "  undocumented " in listed
    assert described("--classes=10") != described("--image-side=64")
    assert all("total" in described(word)[-1] for word in ("--classes=10", "--image-side=64"))


def test_a_network_larger_than_the_memory_is_refused_before_it_is_built(described):
    sizes = [f"--set=model.{size}" for size in ("width=65536", "depth=1", "heads=1024", "head_size=4096")]
    with pytest.raises(SettingsError, match="of memory; choose a smaller model.width"):
        described(*sizes)
