"""Training without a GPU: precision, compilation and processes suit the machine; every part trains under the preset.

pytest tests/training/test_cpu.py        no GPU, no data, under a minute
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import reference
import torch
import torch.nn.functional as F
from reference import perform
from torch import nn

from common.errors import SettingsError
from config.settings import resolve
from model import TABLES, build_model
from models.attention import attend, explicit_attention
from optim.muon import Muon, newton_schulz, orthogonalize, working_dtype
from optim.optimizers import build_optimizer
from parallel import compile as compiling
from parallel import precision
from training import cpu_processes

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PARTS = [(kind, name) for kind, table in TABLES.items() if kind != "architecture" for name in table]
SMALL = [
    "train_batch_size=4",
    "model.width=16",
    "model.heads=2",
    "model.head_size=8",
    "model.depth=1",
    "model.patch_embedding_options.first=4",
]


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_explicit_attention_is_scaled_dot_product_attention(masked):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 8, generator=generator) for _ in range(3))
    mask = ~torch.eye(9, dtype=torch.bool) if masked else None
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(explicit_attention(q, k, v, mask), expected)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.03, rtol=0.03)


def test_attention_takes_the_explicit_form_in_bf16_on_a_cpu_alone(monkeypatch):
    calls = []
    monkeypatch.setattr("models.attention.explicit_attention", lambda q, k, v, **_: calls.append(v.dtype) or v)
    x = torch.ones(1, 1, 2, 4)
    attend(x, x, x)
    assert not calls
    attend(x.bfloat16(), x.bfloat16(), x.bfloat16())
    assert calls == [torch.bfloat16]


def test_dropout_leaves_out_weights_of_explicit_attention_and_keeps_their_mean():
    torch.manual_seed(0)
    x, ones = torch.randn(8, 4, 64, 8), torch.ones(8, 4, 64, 8)
    found = explicit_attention(x, x, ones, dropout_p=0.5)
    assert found.std() > 0.05 and abs(found.mean() - 1) < 0.02


# --- precision ------------------------------------------------------------------------------------------------------


def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch):
    for flags, comes_to, said in (
        ({"avx2", "amx_bf16"}, "autocast", "amx_bf16"),
        ({"avx512_bf16"}, "autocast", "avx512_bf16"),
        ({"avx2", "avx512f"}, False, "fp32, because the device"),
        (set(), False, "fp32"),
    ):
        monkeypatch.setattr(precision, "cpu_flags", lambda flags=flags: frozenset(flags))
        chosen, sentence = precision.choose("auto", None, None, CPU)
        assert chosen == comes_to and said in sentence
        assert precision.choose("auto", "it has none", None, CPU) == (
            False,
            "fp32, because it has none (--set bf16.enabled=true chooses bf16)",
        )


@pytest.mark.parametrize("setting", [True, False, "autocast"])
def test_what_was_set_is_not_questioned(monkeypatch, setting):
    monkeypatch.setattr(precision, "cpu_flags", frozenset)
    assert precision.choose(setting, None, None, CPU) == (setting, None)


def test_autocast_is_refused_by_a_strategy_that_has_none():
    with pytest.raises(SettingsError, match="bf16.enabled=autocast: it has none"):
        precision.choose("autocast", "it has none", None, CPU)


@pytest.mark.parametrize("value", ["auto", "autocast", "masters", "true", "false"])
def test_the_setting_takes_words_and_truths(value):
    assert str(resolve(None, ["bf16.enabled=auto", f"bf16.enabled={value}"]).engine["bf16"]["enabled"]).lower() == value
    with pytest.raises(SettingsError, match="bf16.enabled must be of type bool, or one of autocast, masters, auto"):
        resolve(None, ["bf16.enabled=autocats"])


def test_muon_orthogonalizes_in_bf16_where_it_is_told_to():
    matrices = [torch.randn(24, 16, generator=torch.Generator().manual_seed(0))]
    exact, half = orthogonalize(matrices)[0], orthogonalize(matrices, dtype=torch.bfloat16)[0]
    assert half.dtype == torch.float32 and not torch.equal(exact, half)
    torch.testing.assert_close(half, exact, atol=0.05, rtol=0.05)
    standing = newton_schulz(matrices[0].T[None], torch.float32)[0].T * (0.2 * 24**0.5)
    torch.testing.assert_close(standing, exact)


# --- compilation ----------------------------------------------------------------------------------------------------


def test_auto_compiles_on_a_cpu_where_it_pays(monkeypatch):
    monkeypatch.setattr(compiling, "trouble_with", lambda device: None)
    assert compiling.choose("auto", CPU, None, None, pays_on_cpu=True) == "on"
    assert compiling.choose("auto", CPU, None, None, pays_on_cpu=False) == "off"
    assert compiling.choose("auto", CPU, "cannot", None, pays_on_cpu=True) == "off"
    monkeypatch.setattr(compiling, "trouble_with", lambda device: "no compiler")
    assert compiling.choose("auto", CPU, None, None, pays_on_cpu=True) == "off"


def test_a_time_budget_decides_what_is_long_enough_to_compile():
    """The number of steps, and so of images, is an estimate then."""
    cases = [(10_000, None), (200_000, None), (10_000, 60.0), (200_000, 2.0)]
    assert [compiling.is_long(*case) for case in cases] == [False, True, True, False]


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), None), ((8, 0), "a GPU with bf16 support")])
def test_bf16_that_a_gpu_emulates_is_not_fast(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    assert precision.fast_bf16(torch.device("cuda", 0)) == expected
    assert working_dtype(torch.device("cuda", 0)) == (torch.bfloat16 if expected else torch.float32)
    assert working_dtype(CPU) == torch.float32


class Stubborn(nn.Module):
    """What no compiler makes anything of."""

    def forward(self, x):
        return x * 2


def test_a_layer_that_cannot_be_compiled_runs_as_it_is():
    def fails(module, inputs):
        raise RuntimeError("an error of the compiler")

    with mock.patch("torch.compile", partial(torch.compile, backend=fails)):
        layer = Stubborn()
        compiled = compiling.Compiled(nn.Sequential(layer), [layer], "on", or_plain=True)
        compiled.use(training=True)
        assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0))
    torch._dynamo.reset()
    torch._dynamo.config.suppress_errors = False


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "strategy", "cores", "number", "said"),
    [
        ([], None, 2, 2, "two processes with half of the 2 cores each"),
        ([], "ddp", 16, 2, "half of the 16 cores"),
        ([], None, 1, 1, "there is one core"),
        ([], None, 3, 1, "3 cores cannot be divided into two equal halves"),
        ([], "gossip", 2, 1, "strategy gossip uses as many processes as NUM_PROCS says"),
        (["train_batch_size=3"], None, 2, 1, "a batch of 3"),
        (["train_batch_size=6", "gradient_accumulation_steps=2"], None, 2, 1, "a batch of 6"),
    ],
)
def test_two_processes_where_they_are_faster_and_train_the_same(overrides, strategy, cores, number, said):
    chosen, reason = cpu_processes.choose(resolve("cpu", overrides, strategy=strategy), cores)
    assert chosen == number and said in reason


@pytest.mark.parametrize(
    ("words", "number"), [(["--strategy", "dp"], "1"), (["--no-such-option"], "1"), (["--micro-batch", "auto"], "1")]
)
def test_the_launcher_gets_a_number_whatever_the_arguments(monkeypatch, capsys, words, number):
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    cpu_processes.main()
    assert capsys.readouterr().out.split()[0] == number


# --- the preset -----------------------------------------------------------------------------------------------------


def small(**parts: str):
    settings = resolve("cpu", SMALL)
    options = {f"{kind}_options": {} for kind in parts if f"{kind}_options" in vars(settings.model)}
    settings.model = replace(settings.model, **options, **parts)
    return settings


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_part_trains_under_the_preset(kind, name):
    """Three steps of its optimizer, in bf16 as on a processor that multiplies it."""
    torch.manual_seed(0)
    settings = small(**{kind: name})
    model = build_model(settings.model, 5, 16)
    optimizer = build_optimizer(settings.engine["optimizer"], model, fused=False)
    assert isinstance(optimizer, Muon)
    optimizer.working_dtype = torch.bfloat16
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(3):
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(images)
        loss = F.cross_entropy(scores.float(), torch.arange(4), label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()
    after = list(model.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) > 0.8 * len(after)


def test_the_networks_maps_stay_channels_last():
    """No convolution gets an image whose channels are not side by side: that would be a copy in each of them."""
    settings, seen = small(), []
    model = build_model(settings.model, 5, 16)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
            )
    model(torch.randn(2, 3, 16, 16))
    assert len(seen) > 4 and all(seen)


def bf16_runs() -> dict[str, dict]:
    """The preset in small, unbroken and resumed, under both engines."""
    import torch.distributed as dist

    from parallel import process_group

    process_group.init_process_group()
    words = [*SMALL, "train_batch_size=8", "bf16.enabled=autocast"]
    results = {}
    for strategy in ("zero", "ddp"):

        def engine(strategy=strategy):
            from optim.lr_schedule import Schedule
            from parallel.strategies import engine_class

            settings = resolve("cpu", words, strategy=strategy)
            return engine_class(strategy)(
                lambda: build_model(settings.model, 10, 16), settings, Schedule(settings.schedule, 20), 3
            )

        box = [TemporaryDirectory().name]
        dist.broadcast_object_list(box, src=0)
        folder = Path(box[0])
        one = engine()
        losses = reference.train(one, reference.SAVED_AT)
        folder.mkdir(exist_ok=True)
        dist.barrier()
        reference.save(one, folder)
        losses += reference.train(one)
        dist.barrier()
        other = engine()
        other.load(folder)
        results[strategy] = {
            "losses": losses,
            "weights": one.weights(),
            "precision": one.precision,
            "again": reference.train(other),
            "weights again": other.weights(),
            "muon": one.master_weights()[0].working_dtype,
        }
    return results


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_in_bf16_resumes_with_the_same_bits(tmp_path, processes):
    found = perform(tmp_path / "bf16", processes, reference.job, {}, {}, ["tests.training.test_cpu:bf16_runs"])
    for result in found.values():
        assert result["precision"] == "autocast"
        assert result["muon"] == (torch.bfloat16 if precision.fast_bf16(CPU) else None)
        assert result["again"] == result["losses"][reference.SAVED_AT :]
        assert reference.largest_difference(result["weights"], result["weights again"]) == 0
    assert found["zero"]["losses"] == pytest.approx(found["ddp"]["losses"], abs=0.02)
