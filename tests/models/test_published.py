"""Published networks have their published sizes and satisfy the contract of a list of layers.

pytest tests/models/test_published.py      no GPU, under a minute; the tests of timm need timm
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from common.errors import SettingsError
from common.paths import PROJECT
from config.settings import ModelSettings
from model import sl_vit
from models.layers import DropPath, trunc_normal
from models.published.table import ARCHITECTURES as PUBLISHED
from models.published.table import get_architecture
from optim.param_groups import parameter_groups

# name, classes, image side, our count, the published figure in millions, its source
ARCHITECTURES = {"sl-vit": sl_vit, **PUBLISHED}
COUNTS = [
    ("cct-7-3x1", 10, 32, 3_760_139, "3.760", "README of SHI-Labs/Compact-Transformers (CIFAR-10)"),
    ("cct-7-3x1", 100, 32, 3_783_269, "3.78", "the same network with 100 classes"),
    ("dhvt-t-4", 100, 32, 6_008_650, "6.0", "arXiv 2210.05958, table 4"),
    ("dhvt-t-2", 100, 32, 5_845_162, "5.8", "arXiv 2210.05958, table 4"),
    ("dhvt-s-4", 100, 32, 23_425_450, "23.4", "arXiv 2210.05958, table 4"),
    ("dhvt-s-2", 100, 32, 22_766_698, "22.8", "arXiv 2210.05958, table 4"),
    ("sl-vit", 100, 32, 2_747_149, "2.75", "our count; no published figure found"),
    ("iformer-small", 1000, 224, 19_866_344, "19.866", "sail-sg/iFormer, docstrings of the models"),
    ("iformer-base", 1000, 224, 47_866_216, "47.866", "sail-sg/iFormer, docstrings of the models"),
    ("iformer-large", 1000, 224, 86_637_096, "86.637", "sail-sg/iFormer, docstrings of the models"),
    ("iformer-small", 10, 128, 19_126_154, "19.13", "the same network with smaller position maps and 10 classes"),
    ("resnet50", 1000, 224, 25_557_032, "25.6", "torchvision's documentation: 25557032"),
    ("lenet", 10, 32, 62_006, "0.062", "the network of PyTorch's and DeepSpeed's CIFAR-10 tutorials"),
    (
        "resnet18-cifar",
        100,
        32,
        11_220_132,
        "11.22",
        "torchvision's 11689512 less 7680 of the stem and 461700 of the head",
    ),
]

# Small enough for one core; the others differ in size only and are checked on the meta device.
SMALL = ["cct-7-3x1", "dhvt-t-4", "dhvt-t-2", "sl-vit", "iformer-small", "resnet50", "resnet18-cifar", "lenet"]


def build(name: str, num_classes: int = 100, image_side: int = 32, **settings) -> nn.Sequential:
    torch.manual_seed(0)
    settings = ModelSettings(architecture=name, **settings)
    return nn.Sequential(*get_architecture(name, ARCHITECTURES)(settings, num_classes, image_side))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def built() -> dict[str, nn.Sequential]:
    """The small networks with 100 classes for 32-pixel images, made once; a test that changes one must not."""
    return {name: build(name) for name in SMALL}


@pytest.mark.parametrize("name, num_classes, image_side, exact, published, source", COUNTS)
def test_parameter_count_is_the_published_one(name, num_classes, image_side, exact, published, source):
    with torch.device("meta"):
        model = build(name, num_classes, image_side)
    decimals = len(published.partition(".")[2])
    assert f"{count(model) / 1e6:.{decimals}f}" == published, source
    assert count(model) == exact


def test_the_counts_are_of_architectures_that_exist():
    counted = {row[0] for row in COUNTS}
    assert counted <= set(ARCHITECTURES)
    for name in set(ARCHITECTURES) - counted:
        warnings.warn(f"no parameter count of {name} is checked: add a row to COUNTS", stacklevel=1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_return_one_contiguous_tensor(name):
    with torch.device("meta"):
        x = torch.zeros(2, 3, 32, 32)
        for layer in get_architecture(name, ARCHITECTURES)(ModelSettings(architecture=name), 100, 32):
            x = layer(x)
            assert isinstance(x, torch.Tensor) and x.is_contiguous(), type(layer)
    assert x.shape == (2, 100)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.startswith(("cct", "dhvt"))])
def test_other_image_sides(name):
    for side in (64, 128):
        with torch.device("meta"):
            assert build(name, 10, side)(torch.zeros(2, 3, side, side)).shape == (2, 10)


@pytest.mark.parametrize(
    "name, side, part",
    [
        ("dhvt-t-4", 30, "image side 30"),
        ("iformer-small", 40, "multiple of 16"),
        ("sl-vit", 36, "--set image_side=32"),
        ("sl-vit", 30, "--set image_side=28"),
    ],
)
def test_an_invalid_image_side_is_rejected(name, side, part):
    with pytest.raises(SettingsError, match=part) as caught:
        build(name, 10, side)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", SMALL)
def test_an_image_does_not_depend_on_other_images_of_its_batch(name, built):
    model = built[name].eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        again = model(images)
    assert torch.equal(together, again)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_gets_a_finite_gradient(name, built):
    model = built[name].train()
    loss = nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([3, 7]))
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
        assert parameter.ndim > 0, f"{parameter_name}: DeepSpeed cannot broadcast a parameter without dimensions"
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", SMALL)
def test_weights_round_trip(name, built):
    model = built[name].eval()
    other = build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
        images = torch.randn(2, 3, 32, 32)
        assert not torch.equal(other.eval()(images), model(images))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("name", ["dhvt-t-4", "dhvt-s-2"])
def test_tokens_and_positions_of_dhvt_start_as_in_its_authors_code(name):
    torch.manual_seed(0)
    drawn = {
        key: value for key, value in build(name).named_parameters() if key.endswith(("class_token", "head_positions"))
    }
    assert len(drawn) > 1
    for key, value in drawn.items():
        assert value.std().item() == pytest.approx(0.02, rel=0.25), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_positions_and_class_tokens_do_not_decay(name):
    with torch.device("meta"):
        model = build(name)
    kept = {
        id(p) for group in parameter_groups(model, 1e-3, 0.05) if group["weight_decay"] == 0 for p in group["params"]
    }
    marks = ("position", "class_token")
    marked = [n for n, p in model.named_parameters() if any(m in n for m in marks)]
    assert marked or name.startswith(("resnet", "lenet"))
    assert all(id(model.get_parameter(n)) in kept for n in marked)
    for module in model.modules():
        for own in getattr(module, "no_weight_decay", ()):
            assert hasattr(module, own), f"{type(module).__name__} has no {own}"


@pytest.mark.parametrize("name", [*ARCHITECTURES, "timm:any"])
def test_used_settings_exist_and_have_an_effect(name):
    used = get_architecture(name, ARCHITECTURES).used_settings
    assert used <= {field.name for field in dataclasses.fields(ModelSettings)}
    if name in SMALL and "drop_path" in used:
        torch.manual_seed(0)
        model = build(name, drop_path=0.9).train()
        kept = [module.keep.item() for module in model.modules() if isinstance(module, DropPath)]
        assert kept[0] == 1 and kept[-1] == pytest.approx(0.1)


def test_truncated_normal_has_no_outliers(monkeypatch):
    """PyTorch returns exactly -2 where its uniform draw is the lower end of the range, one in 2^24 in float32."""
    plain = torch.nn.init.trunc_normal_

    def with_outlier(tensor, std):
        plain(tensor, std=std)
        with torch.no_grad():
            tensor.view(-1)[0] = -2.0

    torch.manual_seed(0)
    expected = plain(torch.empty(1000), std=0.02)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", with_outlier)
    torch.manual_seed(0)
    found = trunc_normal(torch.empty(1000), std=0.02)
    assert found.abs().max() <= 0.121 and torch.equal(found[1:], expected[1:])


def test_dropout_of_cct_acts_in_training_only():
    images = torch.randn(2, 3, 32, 32)
    model = build("cct-7-3x1", dropout=0.5)
    with torch.no_grad():
        assert not torch.equal(model.train()(images), model(images))
        assert torch.equal(model.eval()(images), model(images))


def test_an_unknown_name_is_rejected_with_the_nearest():
    with pytest.raises(SettingsError, match="did you mean 'dhvt-t-4'"):
        get_architecture("dhvt-t4")


def test_importing_the_table_imports_no_library_of_models():
    code = (
        "import json, sys, models.published.table; "
        "print(json.dumps([m for m in ('timm', 'torchvision') if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []


def test_without_timm_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(SettingsError, match="pip install timm"):
        build("timm:test_vit")


@pytest.mark.parametrize("drop_path", [0.0, 0.2])
def test_drop_path_reaches_timm_models_also_at_zero(drop_path):
    """nest has a default of 0.5, which model.drop_path=0 must replace; vgg has no stochastic depth."""
    pytest.importorskip("timm", reason="timm is optional and not installed")
    with torch.device("meta"):
        model = build("timm:nest_tiny", 10, 224, drop_path=drop_path)
        rates = [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")]
        assert max(rates, default=0.0) == pytest.approx(drop_path)
        if not drop_path:
            build("timm:vgg11", 10, 224)


def test_timm_models_by_name():
    pytest.importorskip("timm", reason="timm is optional and not installed")
    with torch.device("meta"):
        assert count(build("timm:vit_base_patch32_224", 10, 224)) == 87_462_922  # published: 88.2 M with 1000 classes
    model = build("timm:test_vit", 10, 64, drop_path=0.1)
    images = torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 10)
    assert build("timm:test_resnet", 10, 32)(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    model(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    kept = {
        id(p) for group in parameter_groups(model, 1e-3, 0.05) if group["weight_decay"] == 0 for p in group["params"]
    }
    assert id(model[0].network.pos_embed) in kept and id(model[0].network.patch_embed.proj.weight) not in kept


@pytest.mark.parametrize(
    "name, side, part",
    [
        ("inception_v3", 32, "fails on 32-pixel images"),
        ("vit_bas_patch32_224", 224, "did you mean vit_base_patch32_224"),
        ("hf-hub:a/b", 224, "no model"),
        ("vit_base_patch32_224", 32, "single patch"),
    ],
)
def test_invalid_timm_models_are_rejected(name, side, part):
    pytest.importorskip("timm", reason="timm is optional and not installed")
    # a network on the meta device is not tried
    device = "cpu" if part.startswith("fails") else "meta"
    with pytest.raises(SettingsError, match=part), torch.device(device):
        build(f"timm:{name}", 10, side)
