"""optimizers.py: every parameter is in exactly one group, and only weights that multiply something decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model import build_model
from optimizers import OPTIMIZERS, build_optimizer, parameter_groups
from settings import SettingsError, resolve

DECAY = 0.05
SMALL = ["model.width=32", "model.depth=2", "model.patch=8", "model.heads=2", "model.head_size=16"]


def network(*overrides: str) -> nn.Module:
    return build_model(resolve("spt-lsa", [*SMALL, *overrides]).model, num_classes=10, image_side=32)


def settings_of(model: nn.Module, lr: float = 1.0) -> dict[str, dict]:
    """The group of each parameter, by the parameter's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in parameter_groups(model, lr, DECAY) for p in group["params"]}


class TreeLayer(nn.Module):
    """A layer that has something to say about its own parameters."""

    no_weight_decay = {"anchor"}
    learning_rate_factors = {"root": 0.25}

    def __init__(self):
        super().__init__()
        self.root, self.leaf, self.anchor = (nn.Parameter(torch.ones(3, 3)) for _ in range(3))


@pytest.mark.parametrize("overrides", [
    [], ["model.pooling=mean", "model.attention=softmax", "model.patch_embedding=linear"], ["model.feed_forward=geglu"],
])
def test_every_trainable_parameter_is_in_exactly_one_group(overrides):
    model = network(*overrides)
    model[-1].norm.requires_grad_(False)
    listed = [id(p) for group in parameter_groups(model, 1e-3, DECAY) for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(listed) < len(list(model.parameters()))  # what is frozen is left out


def test_vectors_tokens_and_positions_do_not_decay_and_matrices_do():
    groups = settings_of(network())
    decaying = {name for name, group in groups.items() if group["weight_decay"] == DECAY}
    assert {group["weight_decay"] for group in groups.values()} == {0.0, DECAY}
    assert not any(name.endswith((".bias", "norm.weight", "log_scale", "class_token", "position.table")) for name in decaying)
    assert {"0.class_token", "0.position.table"} <= set(groups)
    matrices = {name for name, p in network().named_parameters() if p.ndim >= 2} - {"0.class_token", "0.position.table"}
    assert decaying == matrices and len(matrices) > 8


def test_a_layer_may_name_what_does_not_decay_and_what_learns_slower():
    groups = settings_of(nn.Sequential(TreeLayer(), nn.Linear(3, 3)), lr=2.0)
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "0.root": (0.5, DECAY), "0.leaf": (2.0, DECAY), "0.anchor": (2.0, 0.0), "1.weight": (2.0, DECAY), "1.bias": (2.0, 0.0)}
    assert all(group["base_lr"] == group["lr"] for group in groups.values())


def test_a_factor_slows_what_the_optimiser_does():
    layer = TreeLayer()
    optimizer = build_optimizer({"type": "SGD", "params": {"lr": 1.0, "weight_decay": 0.0}}, layer, fused=False)
    (layer.root.sum() + layer.leaf.sum()).backward()
    optimizer.step()
    assert layer.root[0, 0].item() == 0.75 and layer.leaf[0, 0].item() == 0.0 and layer.anchor[0, 0].item() == 1.0


def test_a_parameter_that_two_layers_share_is_listed_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    assert sum(len(group["params"]) for group in parameter_groups(model, 1.0, DECAY)) == 3
    build_optimizer(resolve(None, []).engine["optimizer"], model, fused=False)


def test_groups_come_in_the_same_order_on_every_process():
    def shape_of_groups() -> list:
        return [(g["weight_decay"], g["lr"], [tuple(p.shape) for p in g["params"]]) for g in parameter_groups(network(), 1.0, DECAY)]

    assert shape_of_groups() == shape_of_groups()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimiser_is_the_one_that_is_named_with_its_settings(name):
    params = {"lr": 0.1, "weight_decay": 0.2, **({} if name == "SGD" else {"betas": [0.8, 0.9], "eps": 1e-6})}
    optimizer = build_optimizer({"type": name, "params": params}, network(), fused=False)
    assert type(optimizer).__name__ == name
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}
    for group in optimizer.param_groups:
        assert group["lr"] == 0.1 and (name == "SGD" or (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6))


@pytest.mark.parametrize(("config", "message"), [
    ({"type": "AdamWW", "params": {"lr": 0.1, "weight_decay": 0.0}}, "unknown optimizer.type 'AdamWW'; did you mean 'AdamW'"),
    ({"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.0, "betas": [0.9, 0.99]}}, "SGD does not take optimizer.params.*betas"),
    ({"type": "AdamW", "params": {"lr": -1.0, "weight_decay": 0.0}}, "AdamW does not take optimizer.params.*-1"),
])
def test_what_an_optimiser_does_not_take_is_refused(config, message):
    with pytest.raises(SettingsError, match=message):
        build_optimizer(config, nn.Linear(2, 2), fused=False)
