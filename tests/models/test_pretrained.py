"""--init-weights by name: found in the cache without a network, and one sentence for everything that can go wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import tiny
from safetensors.torch import save_file

from common.errors import SettingsError
from models import pretrained
from models.initial_weights import load_initial_weights
from models.pretrained import local_file, recorded_name

hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
constants = pytest.importorskip("huggingface_hub.constants")
errors = pytest.importorskip("huggingface_hub.errors")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of huggingface_hub on a machine without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_a_file_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    """Shells leave ~ alone in --init-weights=~/w.safetensors."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.safetensors").touch()
    assert local_file("~/w.safetensors") == tmp_path / "w.safetensors"


def put(cache: Path, repository: str, name: str, tensors: dict) -> None:
    """Put a file where a download would have put it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    save_file(tensors, snapshot / name)


@pytest.mark.parametrize("file", ["model.safetensors", "weights.safetensors"])
def test_cached_weights_are_loaded_without_a_network(cache, file):
    given = tiny()
    put(cache, "someone/tiny-vit", file, given.state_dict())
    network = tiny()
    with torch.no_grad():
        network[3].classify.weight.zero_()
    report = load_initial_weights(network, "hf:someone/tiny-vit")
    assert torch.equal(network[3].classify.weight, given[3].classify.weight)
    assert report[0].startswith("hf:someone/tiny-vit: ") and str(cache) not in "".join(report)


def test_names_of_timm_are_repositories_of_its_weights(cache):
    pytest.importorskip("timm", reason="timm is optional and not installed")
    repository = "timm/vit_base_patch32_224.augreg_in21k_ft_in1k"
    put(cache, repository, "model.safetensors", {"head.bias": torch.zeros(2)})
    assert local_file("timm:vit_base_patch32_224").parts[-4] == f"models--{repository.replace('/', '--')}"
    with pytest.raises(SettingsError, match="has no such weights; did you mean .*vit_base_patch32_224"):
        local_file("timm:vit_base_patch32_225")


def unreachable(*_: object) -> None:
    raise errors.LocalEntryNotFoundError("no network")


@pytest.mark.parametrize(
    ("is_forbidden", "sentence"),
    [
        (False, "the Hugging Face Hub cannot be reached; run the command once with a network"),
        (True, "HF_HUB_OFFLINE=1 forbids the download; run the command once with HF_HUB_OFFLINE=0 and a network"),
    ],
)
def test_without_a_network_the_answer_is_one_sentence(cache, monkeypatch, is_forbidden, sentence):
    if not is_forbidden:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    with pytest.raises(SettingsError) as caught:
        local_file("hf:someone/unknown")
    said = str(caught.value)
    assert said.startswith(f"--init-weights hf:someone/unknown is not in the cache and {sentence}, or")
    assert "https://huggingface.co/someone/unknown" in said and "\n" not in said


def raised(kind: type[Exception], monkeypatch) -> str:
    """Return the message for an error of the hub."""
    from unittest.mock import Mock

    def fail(*_: object, **__: object) -> None:
        if issubclass(kind, errors.HfHubHTTPError):
            raise kind("401 Client Error", response=Mock())
        raise kind("no luck")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(SettingsError) as caught:
        local_file("hf:someone/thing")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_error_of_the_hub_has_its_sentence(monkeypatch):
    assert "has none of model.safetensors, weights" in raised(errors.RemoteEntryNotFoundError, monkeypatch)
    assert "has no public repository 'someone/thing'" in raised(errors.RepositoryNotFoundError, monkeypatch)
    assert "has no public repository 'someone/thing'" in raised(errors.HFValidationError, monkeypatch)
    assert "accept the terms at https://huggingface.co/someone/thing" in raised(errors.GatedRepoError, monkeypatch)
    assert "cannot be downloaded (401 Client Error); try again" in raised(errors.HfHubHTTPError, monkeypatch)
    assert "cannot be downloaded (no luck); try again" in raised(ConnectionError, monkeypatch)


def test_files_and_names_are_told_apart(tmp_path):
    (tmp_path / "w.safetensors").touch()
    assert local_file(str(tmp_path / "w.safetensors")) == tmp_path / "w.safetensors"
    assert recorded_name(str(tmp_path / "w.safetensors")) == "w.safetensors"
    assert recorded_name("hf:someone/thing") == "hf:someone/thing" and pretrained.is_name("timm:x")
    with pytest.raises(SettingsError, match="no such file"):
        local_file(str(tmp_path / "missing.pth"))
