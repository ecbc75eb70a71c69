"""Every strategy rejects settings that it would not use, in a sentence that names them."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import reference
import torch
from reference import perform, pretended_gpus, refusal, settings_for, with_batch_norm
from torch import nn

from common.errors import SettingsError
from inference.onnx_export import to_onnx
from models.activation_checkpointing import checkpoint_blocks
from parallel import strategies
from parallel.bf16_copy import Bf16Copy
from parallel.engine import Engine
from parallel.setting_checks import check_unused_settings

REFUSED = {  # strategy and settings: text in the message
    ("ddp", ("zero_optimization.stage=2",)): "strategy ddp would not use zero_optimization.stage=2",
    ("fsdp", ("zero_optimization.stage=0",)): "strategy fsdp would not use zero_optimization.stage=0",
    (
        "gossip",
        ("zero_optimization.offload_optimizer.device=cpu",),
    ): "strategy gossip would not use zero_optimization.offload_optimizer.device=cpu",
    ("ddp", ("parallel.topology=complete",)): "strategy ddp would not use parallel.topology=complete",
    ("zero", ("parallel.stages=4",)): "strategy zero would not use parallel.stages=4",
    ("gossip", ("parallel.local_steps=4",)): "strategy gossip would not use parallel.local_steps=4",
    ("local", ("parallel.moment_steps=4",)): "strategy local would not use parallel.moment_steps=4",
    ("gossip", ("parallel.topology=rings",)): "unknown parallel.topology 'rings'; did you mean 'ring'",
    (
        "gossip",
        ("parallel.topology=alternating_exponential_ring",),
    ): "needs 2, 4, 8, ... machines .* not 2 processes with 2 per machine",
    ("gossip", ("parallel.moment_steps=2", "optimizer.type=SGD")): "parallel.moment_steps=2 needs Adam's moments",
    ("gossip", ("parallel.moment_steps=0",)): "parallel.moment_steps must be >= 1, got 0",
    ("local", ("parallel.local_steps=0",)): "parallel.local_steps must be >= 1, got 0",
    ("local", ("parallel.outer_momentum=1.0",)): r"parallel.outer_momentum must be in \[0, 1\), got 1.0",
    ("pipeline", ("zero_optimization.stage=2",)): "pipeline works with zero_optimization.stage 0 or 1, not 2",
    (
        "pipeline",
        ("zero_optimization.stage=0",),
    ): "clips wrongly at zero_optimization.stage=0; choose stage 1, or gradient_clipping=0.0",
    (
        "pipeline",
        ("zero_optimization.offload_optimizer.device=cpu",),
    ): "pipeline would not use zero_optimization.offload_optimizer",
    ("pipeline", ("parallel.stages=3",)): "parallel.stages=3 does not divide the number of processes, 2",
    ("pipeline", ("parallel.partition=size",)): "unknown parallel.partition 'size'",
    ("pipeline", ("parallel.partition=time",)): "add --set image_side=32",
    ("dp", ()): "strategy dp divides a batch over the GPUs of one machine, and there are 0 here",
    ("ddp", ("train_batch_size=7",)): "train_batch_size=7 is not divisible by 2 data-parallel processes",
    ("ddp", ("optimizer.type=AdamWW",)): "unknown optimizer.type 'AdamWW'",
    (
        "gossip",
        ("optimizer.type=AdamWScheduleFree", "schedule.shape=constant"),
    ): "gossip does not support optimizer.type=AdamWScheduleFree: the workers exchange",
    (
        "ddp",
        ("optimizer.type=AdamWScheduleFree",),
    ): "needs a constant learning rate after the warmup, got schedule.shape=cosine. Add --set schedule.shape=constant",
    (
        "pipeline",
        ("optimizer.type=Lamb",),
    ): "Lamb needs the norm of each full parameter, but zero_optimization.stage=1 shards them",
    (
        "fsdp",
        ("compile=reduce-overhead",),
    ): "fully_shard gives the parameters new memory in every step, which CUDA graphs cannot follow",
    ("ddp", ("compile=max-autotune",)): "compile=max-autotune: CUDA graphs need a GPU",
    ("fsdp", ("bf16.enabled=masters",)): "bf16.enabled=masters: only ddp has it; zero and pipeline have bf16 weights",
    (
        "pipeline",
        ("channels_last=true",),
    ): r"strategy pipeline would not use channels_last: .* must be contiguous. Add --set channels_last=false",
    ("ddp", ("channels_last=true",)): "this network has none; add --set channels_last=false",
    ("ddp", ("ema.decay=-0.1",)): r"ema.decay must be in \[0, 1\), got -0.1",
}


def refusals() -> dict[str, str]:
    """Return the messages in two forked processes, by strategy and settings."""
    scalar = nn.Linear(2, 2)
    scalar.temperature = nn.Parameter(torch.tensor(1.0))
    cases = {f"{strategy}: {' '.join(overrides)}": refusal(strategy, *overrides) for strategy, overrides in REFUSED}
    with pretended_gpus():
        cases["dp: by a launcher"] = refusal("dp")
    cases["ddp: BatchNorm"] = refusal(
        "ddp", "optimizer.type=AdamWScheduleFree", "schedule.shape=constant", build=with_batch_norm
    )
    return cases | {"fsdp: a scalar": refusal("fsdp", build=lambda: nn.Sequential(scalar))}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> dict[str, str]:
    return perform(
        tmp_path_factory.mktemp("refusals") / "on-2",
        2,
        reference.job,
        {},
        {},
        ["tests.parallel.test_setting_checks:refusals"],
    )


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0]}: {' '.join(case[1])}")
def test_an_unusable_setting_is_rejected(on_two, case):
    said = on_two[f"{case[0]}: {' '.join(case[1])}"]
    assert re.search(REFUSED[case], said), said


def test_dp_by_a_launcher_is_refused(on_two):
    assert "start it without a launcher: python train.py --strategy dp" in on_two["dp: by a launcher"]


def test_batch_norm_does_not_go_with_an_optimizer_that_averages_itself(on_two):
    assert "BatchNorm's statistics would be those of the trained ones" in on_two["ddp: BatchNorm"]


def test_a_dp_engine_refuses_to_compile():
    with (
        pretended_gpus(),
        pytest.raises(SettingsError, match="compile=on: DataParallel copies the network to every GPU in every step"),
    ):
        reference.make_engine("dp", settings_for("compile=on"))


def test_a_parameter_that_cannot_be_sharded_is_refused(on_two):
    assert "parameter 0.temperature has no dimension, which fully_shard cannot" in on_two["fsdp: a scalar"]


def test_a_key_of_ds_config_that_only_deepspeed_knows_is_refused_by_name():
    settings = settings_for()
    settings.engine["prescale_gradients"] = True
    with pytest.raises(SettingsError, match="strategy ddp would not use prescale_gradients=True of ds_config.json"):
        check_unused_settings("ddp", settings, frozenset(), uses_full_ds_config=False)
    check_unused_settings("zero", settings, frozenset(), uses_full_ds_config=True)


def test_a_strategy_of_the_user_has_no_peers(tmp_path):
    (tmp_path / "mine.py").write_text("from parallel.local import Engine\n")
    with pytest.raises(SettingsError, match="--host-peers and --join need --strategy local, not .*/mine.py:Engine"):
        strategies.engine_class(f"{tmp_path}/mine.py:Engine", peers=True)


@pytest.mark.parametrize("strategy", ["zero", "pipeline"])
def test_without_deepspeed_its_strategies_name_one_that_works(strategy, monkeypatch):
    monkeypatch.setattr(strategies, "is_installed", lambda package: package != "deepspeed")
    with pytest.raises(SettingsError, match=f"strategy {strategy} needs DeepSpeed, .*--strategy ddp trains without it"):
        strategies.engine_class(strategy)
    assert strategies.engine_class("ddp").name == "ddp"


NEWER = {  # what needs a newer PyTorch: its first version, and a call that uses it
    "strategy fsdp": ("2.6", lambda: strategies.engine_class("fsdp")),
    "bf16.enabled=masters": ("2.1", lambda: Bf16Copy(nn.Linear(2, 2))),
    "model.checkpoint_blocks=true": ("2.1", lambda: checkpoint_blocks([nn.Linear(2, 2)] * 3, "vit")),
    "--export onnx": ("2.6", lambda: to_onnx(nn.Identity(), 2)),
    "--log-gradients": ("2.6", lambda: Engine.log_gradients(SimpleNamespace(gradient_log_refusal=None))),
}


@pytest.mark.parametrize("what", NEWER)
def test_what_needs_a_newer_pytorch_is_rejected_by_name(monkeypatch, what):
    monkeypatch.setattr(torch, "__version__", "2.0.1+cu117")
    version, use = NEWER[what]
    with pytest.raises(
        SettingsError, match=rf"^{what} needs PyTorch {version} or newer, not 2.0.1.cu117; leave it out"
    ):
        use()
