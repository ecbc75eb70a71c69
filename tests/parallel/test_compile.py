"""torch.compile trains as the plain network does, keeps the names of the state, and is refused where it would not.

The one test that really compiles needs a C++ compiler and a minute or two. Run:

    python -m pytest tests/parallel/test_compile.py -m slow
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import reference
import torch
from reference import (
    NUM_CLASSES,
    RECIPES,
    SAVED_AT,
    SIDE,
    assert_counts,
    largest_difference,
    make_engine,
    perform,
    plain_loop,
    save,
    settings_for,
    train,
    train_and_save,
)
from torch import nn

from common.errors import SettingsError
from models.layers import DropPath
from parallel import compile as compiling
from parallel.buffers import normalize_in_fp32

CASES = {  # name: strategy and settings
    "ddp": ("ddp", []),
    "zero 2": ("zero", ["zero_optimization.stage=2"]),
    "fsdp": ("fsdp", []),
    "pipeline": ("pipeline", ["parallel.stages=2"]),
}
RECIPE = [*RECIPES["accumulated, clipped"], "compile=on"]


def captured() -> dict[str, dict]:
    """Every strategy with its layers captured as graphs and run by PyTorch's own kernels, without a compiler."""
    import torch.distributed as dist

    results = {}
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")), TemporaryDirectory() as folder:
        for name, (strategy, more) in CASES.items():
            results[name] = train_and_save(strategy, [*RECIPE, *more], Path(folder), look=True)
        dist.barrier()
    return results


def evaluated() -> dict[str, dict]:
    """Scores of an engine that compiles its evaluation and of one that does not, and the calls of compiled layers."""
    calls = []

    def noted(forward, **options):
        run = compile_layer(forward, backend="aot_eager", **options)
        return lambda *arguments: calls.append(1) or run(*arguments)

    images, compile_layer = reference.data()[0][0], torch.compile
    plain = make_engine("ddp", settings_for("compile=off"))
    with mock.patch("torch.compile", noted):
        compiled = make_engine("ddp", settings_for("compile=on", "compile_evaluation=true"))
    calls.clear()  # one was the trial whether compiling works
    for engine in (plain, compiled):
        engine.compiled.use(training=False)
    scores = {"plain": plain.forward(images).detach(), "compiled": compiled.forward(images).detach()}
    refusal = reference.refusal("ddp", "compile=off", "compile_evaluation=true")
    return {"evaluation": {**scores, "calls": len(calls), "layers": len(compiled.layers()), "refusal": refusal}}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> dict:
    return perform(
        tmp_path_factory.mktemp("captured") / "on-2",
        2,
        reference.job,
        {},
        {},
        [f"tests.parallel.test_compile:{cases}" for cases in ("captured", "evaluated")],
    )


@pytest.fixture(scope="module")
def plain() -> dict:
    return plain_loop(settings_for(*RECIPES["accumulated, clipped"]))


@pytest.mark.parametrize("name", CASES)
def test_captured_layers_train_as_plain_ones_do_and_keep_their_names(on_two, plain, name):
    result = on_two[name]
    assert result["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert largest_difference(result["weights"], plain["weights"]) < 1e-5  # the same keys, too
    assert_counts(result["counts"], result["weights"])
    assert "compile on" in result["said"]


def small() -> nn.Module:
    """Two layers with dropout, which draws random numbers."""
    return nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 16), nn.GELU(), nn.Dropout(0.1)),
        nn.Linear(16, NUM_CLASSES),
    )


def really_compiled() -> dict[str, dict]:
    """Losses and weights: plain without dropout, compiled without it, compiled with it, and the last one resumed."""

    def engine(compile: str, dropout: bool):
        def build() -> nn.Module:
            network = small()
            network[0][3].p = 0.1 if dropout else 0.0
            return network

        return make_engine("ddp", settings_for(f"compile={compile}"), build)

    results = {}
    for name, one in (
        ("plain", engine("off", False)),
        ("compiled", engine("on", False)),
        ("dropout", engine("on", True)),
    ):
        results[name] = {"losses": train(one, SAVED_AT)}
        if name == "dropout":
            with TemporaryDirectory() as folder:
                save(one, Path(folder))
                results[name]["losses"] += train(one)
                resumed = engine("on", True)
                resumed.load(Path(folder))
                results["resumed"] = {"losses": train(resumed), "weights": resumed.weights()}
        results[name]["weights"] = one.weights()
    return results


@pytest.mark.slow
def test_compiled_layers_train_as_plain_ones_do_and_a_resumed_run_has_the_same_bits(tmp_path):
    found = perform(tmp_path / "on-1", 1, reference.job, {}, {}, ["tests.parallel.test_compile:really_compiled"])
    assert found["compiled"]["losses"] == pytest.approx(found["plain"]["losses"], abs=1e-5)
    assert largest_difference(found["compiled"]["weights"], found["plain"]["weights"]) < 1e-5
    assert found["dropout"]["losses"] != found["compiled"]["losses"]
    assert found["resumed"]["losses"] == found["dropout"]["losses"][SAVED_AT:]
    assert largest_difference(found["resumed"]["weights"], found["dropout"]["weights"]) == 0


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("setting", "device", "refusal", "graphs_refusal", "comes_to"),
    [
        ("auto", CPU, None, None, "off"),
        ("auto", GPU, None, None, "on"),
        ("auto", GPU, "cannot", None, "off"),
        ("off", GPU, None, None, "off"),
        ("on", CPU, None, "cannot", "on"),
        ("reduce-overhead", GPU, None, None, "reduce-overhead"),
        ("auto-graphs", GPU, None, None, "reduce-overhead"),
        ("auto-graphs", GPU, None, "cannot", "on"),
        ("auto-graphs", GPU, "cannot", None, "off"),
        ("auto-graphs", CPU, None, None, "off"),
    ],
)
def test_the_mode_follows_from_setting_device_and_strategy(
    monkeypatch, setting, device, refusal, graphs_refusal, comes_to
):
    monkeypatch.setattr(compiling, "trouble_with", lambda device: None)
    assert compiling.choose(setting, device, refusal, graphs_refusal) == comes_to


@pytest.mark.parametrize(
    ("setting", "device", "refusals", "sentence"),
    [
        ("on", GPU, ("it copies", None), "compile=on: it copies"),
        ("reduce-overhead", GPU, (None, "it moves"), "compile=reduce-overhead: it moves"),
        ("max-autotune", CPU, (None, None), "compile=max-autotune: CUDA graphs need a GPU"),
        ("onn", GPU, (None, None), "unknown compile 'onn'; did you mean 'on'"),
    ],
)
def test_an_impossible_mode_is_rejected_by_name(setting, device, refusals, sentence):
    with pytest.raises(SettingsError, match=sentence):
        compiling.choose(setting, device, *refusals)


def test_cuda_graphs_need_pytorch_2_1(monkeypatch):
    monkeypatch.setattr(compiling, "trouble_with", lambda device: None)
    monkeypatch.delattr(torch, "compiler")
    assert compiling.choose("auto-graphs", GPU, None, None) == "on"
    with pytest.raises(SettingsError, match="compile=reduce-overhead: CUDA graphs need PyTorch 2.1 or newer"):
        compiling.choose("reduce-overhead", GPU, None, None)


def test_a_machine_that_cannot_compile_trains_uncompiled_unless_compiling_was_requested(monkeypatch, caplog):
    monkeypatch.setattr(compiling, "trouble_with", lambda device: "no C compiler")
    assert compiling.choose("auto", GPU, None, None) == "off"
    assert "torch.compile does not work on this machine (no C compiler)" in caplog.text
    with pytest.raises(
        SettingsError,
        match="compile=on: torch.compile does not work on this machine .no C compiler.; --set compile=off trains",
    ):
        compiling.choose("on", GPU, None, None)


def test_evaluation_runs_the_plain_network(monkeypatch):
    """Compiled forwards are added and removed, and nothing of them remains in the module."""
    calls = []

    def pretend(forward, **options):
        def noted(*arguments):
            calls.append(options)
            return forward(*arguments)

        return noted

    monkeypatch.setattr(torch, "compile", pretend)
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    keys, layers = list(model.state_dict()), compiling.Compiled(model, list(model), "on")
    for training, expected in ((False, 0), (True, 3), (True, 6), (False, 6)):
        layers.use(training)
        model(torch.ones(1, 2))
        assert len(calls) == expected and list(model.state_dict()) == keys
    assert all("forward" not in vars(layer) for layer in model)
    norm = nn.Sequential(nn.BatchNorm1d(2)).bfloat16()
    norm[0].running_mean, norm[0].running_var = norm[0].running_mean.float(), norm[0].running_var.float()
    normalize_in_fp32(norm)
    compiled, x = compiling.Compiled(norm, list(norm), "on"), torch.ones(2, 2, dtype=torch.bfloat16)
    expected = norm.eval()(x)
    for training in (True, False, False):
        compiled.use(training)
        assert torch.equal(norm(x), expected), "a layer's own forward is restored"
    whole = compiling.Compiled(model, list(model), "reduce-overhead")
    assert list(whole.forwards) == [model] and not compiling.Compiled(model, list(model), "off").forwards


def test_compiled_evaluation_gives_the_scores_of_the_plain_network_and_needs_compile_on(on_two):
    result = on_two["evaluation"]
    assert torch.allclose(result["compiled"], result["plain"], atol=1e-5)
    assert result["calls"] == result["layers"] > 0
    assert result["refusal"] == "compile_evaluation=true needs compile=on, and compile is off in this run"


def test_blocks_that_differ_in_their_stochastic_depth_share_one_compilation():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    for share in (0.1, 0.2, 0.3):
        block = nn.Sequential(nn.Linear(4, 4), DropPath(share))
        torch.compile(block.forward, dynamic=False, backend=counter)(torch.ones(2, 4))
    assert counter.frame_count == 1
