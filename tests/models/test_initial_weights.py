"""models/initial_weights.py: weights of a file are loaded by name and shape; all others are reported or rejected.

pytest tests/models/test_initial_weights.py      no GPU, some seconds; the tests of timm need timm
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from bomb import Bomb
from safetensors.torch import save_file
from torch import nn

from common.errors import SettingsError
from config.settings import ModelSettings
from model import ARCHITECTURES
from models.initial_weights import load_initial_weights, read_torch_file, resample_positions
from models.published.table import get_architecture


def build(name: str = "cct-7-3x1", num_classes: int = 100, image_side: int = 32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*get_architecture(name)(ModelSettings(architecture=name), num_classes, image_side))


def same(a: nn.Module, b: nn.Module, but: tuple[str, ...] = ()) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return all(torch.equal(ours[name], theirs[name]) for name in ours if name not in but)


def plain(weights):
    return weights


def nested(weights):
    return {"state_dict": weights, "epoch": 3}


def wrapped(weights):
    return {"model": {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()}}


@pytest.mark.parametrize("dress", [plain, nested, wrapped])
def test_all_tensors_of_a_torch_file_are_loaded(tmp_path: Path, dress):
    source, model = build(seed=1), build(seed=2)
    assert not same(source, model)
    torch.save(dress(source.state_dict()), tmp_path / "w.pth")
    report = load_initial_weights(model, tmp_path / "w.pth")
    assert same(source, model)
    assert len(report) == 1 and "100.0%" in report[0]


def test_a_prefix_is_stripped_at_the_start_of_a_name_only(tmp_path: Path):
    weights = build(seed=1).state_dict()
    weights["0.module.extra"] = torch.zeros(2)
    torch.save(weights, tmp_path / "w.pt")
    assert any("0.module.extra" in line for line in load_initial_weights(build(seed=2), tmp_path / "w.pt"))


@pytest.mark.parametrize(
    "name, head", [("cct-7-3x1", "8.classify"), ("dhvt-t-4", "13.classify"), ("resnet18-cifar", "9.fc")]
)
def test_the_head_is_initialized_randomly_when_the_classes_differ(tmp_path: Path, name, head):
    source, model, before = build(name, 10, seed=1), build(name, 100, seed=2), build(name, 100, seed=2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    report = load_initial_weights(model, tmp_path / "w.safetensors")
    names = (f"{head}.weight", f"{head}.bias")
    assert same(source, model, but=names)
    assert all(torch.equal(model.state_dict()[n], before.state_dict()[n]) for n in names)
    assert len(report) == 2 and "head" in report[1] and all(n in report[1] for n in names)


def test_missing_unused_and_misfitting_tensors_are_named(tmp_path: Path):
    weights = build(seed=1).state_dict()
    del weights["3.norm.bias"]
    weights["stranger"] = torch.zeros(3)
    weights["2.qkv.weight"] = torch.zeros(5, 5)
    torch.save(weights, tmp_path / "w.bin")
    report = "\n".join(load_initial_weights(build(seed=2), tmp_path / "w.bin"))
    told = {
        "not in the file": "3.norm.bias",
        "not used": "stranger",
        "other shape": "2.qkv.weight (5, 5) -> (768, 256)",
    }
    for what, name in told.items():
        assert any(what in line and name in line for line in report.splitlines()), report


@pytest.mark.parametrize(("version", "reads"), [("2.5.1+cpu", False), ("2.6.0", True), ("2.10.0+cu130", True)])
def test_pickled_weights_are_read_from_pytorch_2_6_on(tmp_path: Path, monkeypatch, version, reads):
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt")
    monkeypatch.setattr(torch, "__version__", version)
    if reads:
        assert list(read_torch_file(tmp_path / "w.pt")) == ["a"]
    else:
        with pytest.raises(SettingsError, match=r"PyTorch 2.5.1\+cpu may run code from a torch.save file"):
            read_torch_file(tmp_path / "w.pt")


def test_torchvision_names_are_known(tmp_path: Path):
    models = pytest.importorskip("torchvision").models
    source, model = models.resnet50(num_classes=5), build("resnet50", 7)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    report = load_initial_weights(model, tmp_path / "w.pth")
    assert torch.equal(model[1].conv2.weight, source.layer1[0].conv2.weight) and len(report) == 2


def test_positions_are_resampled_to_another_image_side(tmp_path: Path):
    source, model = build(image_side=64, seed=1), build(image_side=32, seed=2)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    report = load_initial_weights(model, tmp_path / "w.safetensors")
    assert same(source, model, but=("0.positions",))
    assert "0.positions (1024, 256) -> (256, 256)" in report[1]


def test_resampling_keeps_class_token_order_and_constants():
    rows = torch.arange(8.0)[:, None, None].expand(8, 8, 2)
    table = torch.cat([torch.full((1, 2), -9.0), rows.reshape(64, 2)])
    small = resample_positions(table, torch.Size((17, 2)), num_prefix=1)
    assert torch.equal(small[0], table[0])
    grid = small[1:].view(4, 4, 2)
    assert (grid.diff(dim=0) > 1).all() and grid.diff(dim=1).abs().max() < 1e-5  # rows stay rows
    assert torch.equal(
        resample_positions(torch.ones(8, 8, 3), torch.Size((16, 16, 3))).round(decimals=5), torch.ones(16, 16, 3)
    )
    assert resample_positions(table, torch.Size((17, 4)), num_prefix=1) is None
    for size in (49, 16):  # of a network without a CLS token
        assert resample_positions(table, torch.Size((size, 2))) is None
    assert resample_positions(table[:0], torch.Size((17, 2)), num_prefix=1) is None


def test_only_position_tables_are_resampled(tmp_path: Path):
    """head_position of `head_tokens` has one vector per head: with other heads it is not a grid to be resampled."""
    sizes = dict(width=72, depth=1, head_size=8, attention="head_tokens", position="none", patch=8, pooling="mean")
    source, model = (
        nn.Sequential(*get_architecture("vit", ARCHITECTURES)(ModelSettings(heads=heads, **sizes), 10, 32))
        for heads in (4, 9)
    )
    before = model[1].attention.part.head_position.detach().clone()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    report = load_initial_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[1].attention.part.head_position, before)
    assert any("other shape" in line and "head_position (4, 72) -> (9, 72)" in line for line in report), report
    assert not any("resampled" in line for line in report)


def test_pickled_code_is_rejected_and_not_executed(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": build().state_dict(), "args": Bomb("exploded")}, "w.pth")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Bomb("exploded"), protocol=2))
    for file in ("w.pth", "raw.pt"):
        with pytest.raises(SettingsError, match=f"{file}.*could run code"):
            load_initial_weights(build(), file)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("none.pth", None, "no such file"),
        ("broken.safetensors", b"not at all", "cannot be read as safetensors"),
        ("text.pth", b"", "w?text.pth"),
        ("list.pth", [torch.zeros(2)], "no named tensors"),
        ("other.pth", {"features.0.weight": torch.zeros(2)}, "features.0.weight"),
        ("head.pth", {"8.classify.bias": torch.zeros(100)}, "matches no tensor"),
    ],
)
def test_files_without_tensors_of_the_network_are_rejected(tmp_path: Path, name, content, part):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    model = build(seed=2)
    with pytest.raises(SettingsError, match=part) as caught:
        load_initial_weights(model, path)
    assert str(path) in str(caught.value) and same(model, build(seed=2))


def test_timm_weights_of_another_size_and_other_classes(tmp_path: Path):
    timm = pytest.importorskip("timm", reason="timm is optional and not installed")
    source = timm.create_model("test_vit", num_classes=1000, img_size=160)
    model = build("timm:test_vit", 10, 64)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    report = load_initial_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[0].network.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)
    assert torch.equal(model[0].network.cls_token, source.cls_token)
    assert len(report) == 3 and "0.network.head.weight" in report[1], report
    assert "0.network.pos_embed (1, 101, 64) -> (1, 17, 64)" in report[2], report
    save_file(model.state_dict(), tmp_path / "ours.safetensors")
    again = build("timm:test_vit", 10, 64, seed=5)
    assert len(load_initial_weights(again, tmp_path / "ours.safetensors")) == 1 and same(again, model)
