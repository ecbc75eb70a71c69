"""optim/optimizers.py: parameter groups, weight decay, and each optimizer against its reference."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import nn

from common.errors import SettingsError
from config.optimizer_defaults import OPTIMIZER_PARAMS
from config.settings import ScheduleSettings, resolve
from model import ARCHITECTURES, TABLES, build_model
from optim import muon
from optim.lr_schedule import Schedule
from optim.optimizers import (
    OPTIMIZERS,
    averaged_weights,
    build_optimizer,
    check_optimizer,
    describe_groups,
    restore_counters,
)
from optim.param_groups import parameter_groups

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


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.pooling=mean", "model.attention=softmax", "model.patch_embedding=linear"],
        ["model.feed_forward=geglu"],
    ],
)
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
    assert not any(
        name.endswith((".bias", "norm.weight", "log_scale", "class_token", "position.table")) for name in decaying
    )
    assert {"0.class_token", "0.position.table"} <= set(groups)
    matrices = {name for name, p in network().named_parameters() if p.ndim >= 2} - {"0.class_token", "0.position.table"}
    assert decaying == matrices and len(matrices) > 8


def test_a_layer_may_name_what_does_not_decay_and_what_learns_slower():
    groups = settings_of(nn.Sequential(TreeLayer(), nn.Linear(3, 3)), lr=2.0)
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "0.root": (0.5, DECAY),
        "0.leaf": (2.0, DECAY),
        "0.anchor": (2.0, 0.0),
        "1.weight": (2.0, DECAY),
        "1.bias": (2.0, 0.0),
    }
    assert all(group["initial_lr"] == group["lr"] for group in groups.values())


@pytest.mark.parametrize("form", [set, list, tuple, dict.fromkeys])
def test_no_weight_decay_may_be_a_method_as_in_timm(form):
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), TreeLayer())
    model[0].no_weight_decay = lambda: form(["1.weight", "absent"])
    groups = settings_of(model)
    assert {name for name, group in groups.items() if group["weight_decay"] == 0} == {
        *("0.0.bias", "0.1.bias", "0.1.weight", "1.anchor")
    }


def test_a_factor_slows_what_the_optimizer_does():
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
        return [
            (g["weight_decay"], g["lr"], [tuple(p.shape) for p in g["params"]])
            for g in parameter_groups(network(), 1.0, DECAY)
        ]

    assert shape_of_groups() == shape_of_groups()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_is_the_one_that_is_named_with_its_settings(name):
    config = resolve(
        None,
        [
            f"optimizer.type={name}",
            "optimizer.params.lr=0.1",
            "optimizer.params.weight_decay=0.2",
            *([] if name == "SGD" else ["optimizer.params.betas=[0.8, 0.9]"]),
        ],
    ).engine["optimizer"]
    optimizer = build_optimizer(config, network(), fused=False)
    assert type(optimizer).__name__ == name
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}
    for group in optimizer.param_groups:
        assert group["lr"] == group["initial_lr"] == 0.1
        assert name == "SGD" or group.get("hidden") or group["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"type": "AdamWW", "params": {"lr": 0.1, "weight_decay": 0.0}},
            "unknown optimizer.type 'AdamWW'; did you mean 'AdamW'",
        ),
        (
            {"type": "SGD", "params": {"lr": 0.1, "weight_decay": 0.0, "betas": [0.9, 0.99]}},
            "SGD rejects optimizer.params.*betas",
        ),
        (
            {"type": "Muon", "params": {**OPTIMIZER_PARAMS["Muon"], "momentum": 1.5}},
            "Muon rejects optimizer.params.*momentum=1.5",
        ),
        (
            {"type": "AdamWScheduleFree", "params": {**OPTIMIZER_PARAMS["AdamWScheduleFree"], "betas": [0.0, 0.999]}},
            "AdamWScheduleFree needs a first number above 0 in optimizer.params.betas",
        ),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused(config, message):
    with pytest.raises(SettingsError, match=message):
        build_optimizer(config, nn.Linear(2, 2), fused=False)


def test_every_optimizer_has_its_parameters_and_the_other_way_round():
    assert set(OPTIMIZERS) == set(OPTIMIZER_PARAMS) and all(
        {"lr", "weight_decay"} <= set(params) for params in OPTIMIZER_PARAMS.values()
    )


# --- what decays, and what Muon trains, over the whole drawer -------------------------------------------------------

NOT_A_WEIGHT = re.compile(
    r"(bias|norm|position|pos_embed|token|table|scale|temperature|gamma|factor|shift|affine)[^.]*$"
)
SMALL_PARTS = ["model.width=32", "model.depth=2", "model.patch=4", "model.heads=2", "model.head_size=16"]
CHOICES = [
    f"model.{kind}={name}"
    for kind in ("patch_embedding", "position", "attention", "feed_forward", "pooling")
    for name in TABLES[kind]
]
WHOLE = [f"model.architecture={name}" for name in ARCHITECTURES if name != "vit"] + [
    "model.architecture=timm:vit_tiny_patch16_224"
]


def drawn(choice: str) -> nn.Module:
    """A network that holds the part, without numbers in its tensors."""
    whole = choice.startswith("model.architecture")
    with torch.device("meta"):
        side = 224 if "timm" in choice else 32
        return build_model(
            resolve(None, [choice] if whole else [*SMALL_PARTS, choice]).model, num_classes=10, image_side=side
        )


@pytest.mark.parametrize("choice", CHOICES + WHOLE)
def test_no_norm_bias_position_or_token_decays_in_any_part_of_the_registry(choice):
    model = drawn(choice)
    groups = settings_of(model)
    modules = dict(model.named_modules())
    assert set(groups) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        is_weight = (
            parameter.ndim >= 2 and not NOT_A_WEIGHT.search(last) and "Norm" not in type(modules[owner]).__name__
        )
        assert (groups[name]["weight_decay"] == DECAY) == is_weight, f"{name} {tuple(parameter.shape)}"


@pytest.mark.parametrize("choice", CHOICES + WHOLE)
def test_muon_gets_hidden_matrices_and_nothing_else(choice):
    model = drawn(choice)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1.0, DECAY, find_hidden=True)
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(names.values())  # each once
    hidden = {names[id(p)]: p for group in groups if group["hidden"] for p in group["params"]}
    assert hidden and all(p.ndim >= 2 and not NOT_A_WEIGHT.search(name) for name, p in hidden.items())
    last = f"{len(model) - 1}."
    if len(model) > 1:  # the first layer reads the images, the last gives the scores
        inner = tuple(
            f"{name}."
            for name, module in model.named_modules()
            if getattr(module, "is_input_or_output_layer", None) is False
        )
        assert not any(name.startswith(("0.", last)) and not name.startswith(inner) for name in hidden)
    else:
        assert not any("head" in name or "patch_embed" in name for name in hidden)
    depthwise = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert not depthwise & set(hidden)


def test_the_groups_are_shown_as_a_table():
    config = resolve(None, ["optimizer.type=Muon", "optimizer.params.matrix_lr_factor=2.0"]).engine["optimizer"]
    head, *rows = describe_groups(config, network()).splitlines()
    assert head.split()[:3] == ["optimizer", "lr", "weight"] and [row.split()[:3] for row in rows] == [
        ["AdamW", "0.001", "0"],
        ["AdamW", "0.001", "0.05"],
        ["Muon", "0.002", "0.05"],
    ]
    assert sum(int(row.split()[4].replace(",", "")) for row in rows) == sum(p.numel() for p in network().parameters())


# --- each against its reference -------------------------------------------------------------------------------------


def trained(config: dict, gradients: list[list[torch.Tensor]], start: list[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters of one linear map after a step with each of the gradients."""
    model = nn.Linear(6, 4)
    for parameter, value in zip(model.parameters(), start, strict=True):
        parameter.data.copy_(value)
    optimizer = build_optimizer(config, model, fused=False)
    for step in gradients:
        for parameter, gradient in zip(model.parameters(), step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return averaged_weights(optimizer, list(model.parameters())) or [p.detach() for p in model.parameters()]


def adam(x, gradients, lr, betas, eps, weight_decay, decoupled, trust=False):
    """arXiv 1412.6980, with the decay inside the gradient or beside it (1711.05101); `trust` is LAMB (1904.00962)."""
    m = v = torch.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        if not decoupled and not trust:
            g = g + weight_decay * x
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g
        step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        if trust:
            step = step + weight_decay * x
            step = step * (x.norm() / step.norm() if weight_decay else 1.0)  # vectors do not decay, and are not scaled
        x = x - lr * (step + (weight_decay * x if decoupled else 0))
    return x


def sgd(x, gradients, lr, momentum, nesterov, weight_decay):
    buffer = None
    for g in gradients:
        g = g + weight_decay * x
        buffer = g if buffer is None else momentum * buffer + g
        x = x - lr * (g + momentum * buffer if nesterov else buffer)
    return x


def lion_steps(x, gradients, lr, betas, weight_decay):
    """arXiv 2302.06675, algorithm 2."""
    m = torch.zeros_like(x)
    for g in gradients:
        x = x - lr * ((betas[0] * m + (1 - betas[0]) * g).sign() + weight_decay * x)
        m = betas[1] * m + (1 - betas[1]) * g
    return x


def schedule_free(x, gradients, lr, betas, eps, weight_decay):
    """arXiv 2405.15682, algorithm 1: the average of z is evaluated, the decay is taken at y."""
    z = x.clone()
    v = torch.zeros_like(x)
    for t, g in enumerate(gradients, start=1):
        y = (1 - betas[0]) * z + betas[0] * x
        v = betas[1] * v + (1 - betas[1]) * g * g
        z = z - lr * (g / ((v / (1 - betas[1] ** t)).sqrt() + eps) + weight_decay * y)
        x = (1 - 1 / t) * x + z / t
    return x


REFERENCES = {
    "AdamW": partial(adam, decoupled=True),
    "Adam": partial(adam, decoupled=False),
    "SGD": sgd,
    "AdamWScheduleFree": schedule_free,
    "Lamb": partial(adam, decoupled=False, trust=True),
    "Lion": lion_steps,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_it_steps_as_its_paper_says(name):
    torch.manual_seed(0)
    start, gradients = [torch.randn(4, 6), torch.randn(4)], [[torch.randn(4, 6), torch.randn(4)] for _ in range(5)]
    params = {**OPTIMIZER_PARAMS[name], "lr": 0.05, "weight_decay": 0.1}
    found = trained({"type": name, "params": params}, gradients, start)
    for i, decay in enumerate((0.1, 0.0)):
        expected = REFERENCES[name](
            start[i].double(), [step[i].double() for step in gradients], **{**params, "weight_decay": decay}
        )
        torch.testing.assert_close(found[i].double(), expected, atol=2e-6, rtol=1e-5)


def test_muon_steps_as_pytorchs_own_does_and_adamw_trains_the_rest(monkeypatch):
    monkeypatch.setattr(muon, "working_dtype", lambda device: torch.bfloat16)  # as PyTorch's has it everywhere
    torch.manual_seed(0)
    start, gradients = [torch.randn(4, 6), torch.randn(4)], [[torch.randn(4, 6), torch.randn(4)] for _ in range(5)]
    params = {**OPTIMIZER_PARAMS["Muon"], "lr": 0.05, "weight_decay": 0.1}
    found = trained({"type": "Muon", "params": params}, gradients, start)
    matrix = nn.Parameter(start[0].clone())
    reference = torch.optim.Muon([matrix], lr=0.05, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for gradient, _ in gradients:
        matrix.grad = gradient.clone()
        reference.step()
    torch.testing.assert_close(found[0], matrix.detach(), atol=5e-3, rtol=0)  # bf16 of a step of 0.05
    assert (found[0] - start[0]).abs().max() > 0.1
    vector = adam(
        start[1].double(), [step[1].double() for step in gradients], 0.05, (0.9, 0.999), 1e-8, 0.0, decoupled=True
    )
    torch.testing.assert_close(found[1].double(), vector, atol=2e-6, rtol=1e-5)


def test_matrices_of_all_shapes_are_orthogonalized_each_for_itself():
    torch.manual_seed(0)
    tensors = [
        torch.randn(8, 8),
        torch.randn(5, 12),
        torch.randn(12, 5),
        torch.randn(3, 6, 4),
        torch.randn(6, 2, 3, 3),
        torch.randn(8, 8),
    ]
    together = muon.orthogonalize(tensors)
    assert [step.shape for step in together] == [tensor.shape for tensor in tensors]
    for tensor, step in zip(tensors, together, strict=True):
        for given, made in zip(
            tensor if tensor.ndim == 3 else [tensor.flatten(1)],
            step if step.ndim == 3 else [step.flatten(1)],
            strict=True,
        ):
            u, _, v = torch.linalg.svd(given, full_matrices=False)
            singular = torch.linalg.svdvals(made) / (0.2 * max(given.shape) ** 0.5)
            assert 0.5 < singular.min() and singular.max() < 1.3
            assert torch.nn.functional.cosine_similarity(made.flatten(), (u @ v).flatten(), dim=0) > 0.97
    torch.testing.assert_close(together[1], muon.orthogonalize(tensors[1:2])[0])


def test_muon_takes_a_kernel_of_one_dimension_as_one_matrix_and_a_stack_of_experts_as_several():
    class Experts(nn.Module):
        muon_matrices = {"stack"}

        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.zeros(6, 4, 3))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3, bias=False), Experts())
    config = {"type": "Muon", "params": {**OPTIMIZER_PARAMS["Muon"], "lr": 1.0, "weight_decay": 0.0, "momentum": 0.0}}
    optimizer = build_optimizer(config, model, fused=False)
    before, gradient = [parameter.detach().clone() for parameter in model.parameters()], torch.randn(6, 4, 3)
    for parameter in model.parameters():
        parameter.grad = gradient.clone()
    optimizer.step()
    kernel, stack = (old - new.detach() for old, new in zip(before, model.parameters(), strict=True))
    torch.testing.assert_close(kernel.flatten(1), muon.orthogonalize([gradient.flatten(1)])[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stack, torch.stack(muon.orthogonalize(list(gradient))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Lamb", "AdamWScheduleFree"])
def test_what_an_optimizer_counts_for_a_group_follows_from_the_step(name):
    config = resolve(None, [f"optimizer.type={name}"]).engine["optimizer"]
    schedule = Schedule(ScheduleSettings(shape="constant", warmup_fraction=0.3), 20)

    def counters(optimizer) -> list:
        kept = ("step", "k", "lr_max", "weight_sum")
        return [{key: float(group[key]) for key in kept if key in group} for group in optimizer.param_groups]

    layer = TreeLayer()
    stepped, restored = (build_optimizer(config, layer, fused=False) for _ in range(2))
    for step in range(9):
        for group in stepped.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step)
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        stepped.step()
    restore_counters(restored, 9, schedule)
    assert counters(restored) == counters(stepped) and all(counters(stepped))


def test_an_average_in_place_of_a_schedule_wants_no_schedule():
    with pytest.raises(
        SettingsError, match="AdamWScheduleFree needs a constant learning rate .* Add --set schedule.shape=constant"
    ):
        check_optimizer(resolve(None, ["optimizer.type=AdamWScheduleFree"]), "zero")
    check_optimizer(resolve(None, ["optimizer.type=AdamWScheduleFree", "schedule.shape=constant"]), "zero")


# --- Muon's option split_qkv ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("attention", ["softmax", "multi_query"])
def test_split_qkv_orthogonalizes_queries_keys_and_values_one_by_one(split, attention):
    changes = [f"model.attention={attention}", "model.pooling=mean"]
    config = resolve(None, ["optimizer.type=Muon", f"optimizer.params.split_qkv={str(split).lower()}"]).engine
    config["optimizer"]["params"] |= {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0}
    torch.manual_seed(0)
    model = network(*changes)
    optimizer = build_optimizer(config["optimizer"], model, fused=False)
    part = model[1].attention.part
    before, gradient = part.qkv.weight.detach().clone(), torch.randn_like(part.qkv.weight)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    part.qkv.weight.grad = gradient.clone()
    optimizer.step()
    matrices = list(gradient.split(part.qkv.row_splits)) if split else [gradient]
    expected = torch.cat(muon.orthogonalize(matrices))
    torch.testing.assert_close(before - part.qkv.weight.detach(), expected, rtol=1e-4, atol=1e-5)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_row_splits_that_do_not_fit_are_refused():
    model = network("model.pooling=mean")
    model[1].attention.part.qkv.row_splits = (32, 32)
    parameter_groups(model, 1.0, DECAY, find_hidden=True)
    sentence = r"row_splits=\(32, 32\) of layer 1.attention.part.qkv must add up to the 96 rows of its weight"
    with pytest.raises(SettingsError, match=sentence):
        parameter_groups(model, 1.0, DECAY, find_hidden=True, split_rows=True)
