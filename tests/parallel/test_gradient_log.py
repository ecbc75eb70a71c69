"""`--log-gradients`: the norms of a plain PyTorch loop, under every strategy that can measure them."""

from __future__ import annotations

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import RECIPES, SEED, batches, data, make_engine, network, perform, settings_for
from torch import nn

from common.errors import SettingsError
from optim.lr_schedule import Schedule
from optim.optimizers import build_optimizer
from parallel import pipeline
from parallel.gradient_log import layer_names

RECIPE = RECIPES["accumulated, clipped"]
CASES = {"ddp": [], "fsdp": [], **{f"zero {stage}": [f"zero_optimization.stage={stage}"] for stage in (0, 1, 2, 3)}}


def measured_cases() -> dict[str, dict]:
    """The norms of the second step, which is measured, and of the third, which is not."""
    results = {}
    for name, more in CASES.items():
        engine = make_engine(name.split()[0], settings_for(*RECIPE, *more))
        engine.log_gradients()
        stream, norms = batches(engine), []
        for step in range(3):
            engine.is_measured_step = step == 1
            engine.train_batch(stream)
            norms.append(engine.norms)
        results[name] = {"norms": [n and {key: value.item() for key, value in n.items()} for n in norms]}
    return results


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("gradients") / "on-2"
    return perform(out, 2, reference.job, {}, {}, ["tests.parallel.test_gradient_log:measured_cases"])


@pytest.fixture(scope="module")
def plain() -> dict[str, float]:
    """The same of a plain loop: norms of each layer in the second step."""
    settings = settings_for(*RECIPE)
    torch.manual_seed(SEED)
    model, schedule = network(settings), Schedule(settings.schedule, 20)
    optimizer = build_optimizer(settings.engine["optimizer"], model, fused=False)
    for step, (images, labels) in zip(range(2), zip(*data(), strict=True), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * schedule(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels, label_smoothing=settings.loss.label_smoothing).backward()
        gradients = [[p.grad.clone() for p in layer.parameters()] for layer in model]
        before = [[p.detach().clone() for p in layer.parameters()] for layer in model]
        nn.utils.clip_grad_norm_(model.parameters(), settings.engine["gradient_clipping"])
        optimizer.step()
    updates = [
        [p.detach() - b for p, b in zip(m.parameters(), old, strict=True)] for m, old in zip(model, before, strict=True)
    ]

    def norm(tensors: list) -> float:
        return sum(t.double().square().sum().item() for t in tensors) ** 0.5

    names = ["0_Embed", "1_Block", "2_Block", "3_Head"]
    expected = {f"gradient_norm/{name}": norm(some) for name, some in zip(names, gradients, strict=True)}
    for name, new, old in zip(names, updates, before, strict=True):
        expected[f"update_ratio/{name}"] = norm(new) / norm(old)
    expected["gradient_norm"] = norm(sum(gradients, []))
    expected["update_ratio"] = norm(sum(updates, [])) / norm(sum(before, []))
    return expected


@pytest.mark.parametrize("name", CASES)
def test_norms_and_ratios_are_those_of_a_plain_loop(measured, plain, name):
    first, second, third = measured[name]["norms"]
    assert first is None and third is None
    assert second == pytest.approx(plain, rel=2e-3)


def test_the_pipeline_refuses_in_one_sentence():
    engine = object.__new__(pipeline.Engine)
    with pytest.raises(SettingsError, match="^--log-gradients: DeepSpeed .*; choose --strategy zero, ddp or fsdp$"):
        engine.log_gradients()


def test_the_layers_of_a_wrapped_network_are_its_blocks():
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))])
    wrapped = nn.Module()
    wrapped.network = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(2, 2)})
    names = layer_names(nn.Sequential(wrapped))
    assert names["0.network.blocks.1.0.weight"] == "0.network.blocks.1_Sequential"
    assert names["0.network.head.weight"] == "0.network.head_Linear"
