"""User-defined parts: every registry takes them, and a wrong one ends in a sentence before any data is fetched."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from documentation import own_part_examples

from common.errors import SettingsError
from config.settings import Settings, declared_settings, resolve
from model import TABLES, build_model
from optim.optimizers import build_optimizer
from parallel.strategies import engine_class
from tools.describe_model import describe_model
from training.own_part_checks import check_before_data, check_own_parts
from training.run_setup import check_parts

REGISTRIES = [path for path, declared in declared_settings().items() if declared.table]
EXAMPLES = {setting: (name, code) for setting, name, code in own_part_examples()}
SMALL = ["model.width=16", "model.depth=1", "model.heads=2", "model.head_size=8", "model.feed_forward_options.hidden=8"]


def settings_with(setting: str, reference: str, *more: str) -> Settings:
    small = [] if setting == "model.architecture" else SMALL[:4] if setting == "model.feed_forward" else SMALL
    return resolve(None, [f"{setting}={reference}", *small, *more])


def check(settings: Settings) -> list[str]:
    engine_class(settings.strategy)
    return check_own_parts(settings, 10, 16)


def test_every_registry_has_an_example_in_the_documentation():
    assert set(REGISTRIES) == set(EXAMPLES)
    assert {f"model.{kind}" for kind in TABLES} <= set(REGISTRIES)


@pytest.mark.parametrize("setting", REGISTRIES)
def test_every_registry_takes_a_part_of_a_file(setting, tmp_path, monkeypatch):
    name, code = EXAMPLES[setting]
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "my-part.py").write_text(code)
    monkeypatch.chdir(folder)
    settings = settings_with(setting, f"my-part.py:{name}")
    tree = settings.as_dict() | settings.as_dict()["engine"]
    for key in setting.split("."):
        tree = tree[key]
    assert tree == f"{folder}/my-part.py:{name}"
    assert Settings.from_dict(settings.as_dict()) == settings
    assert check(settings) == []
    (folder / "my-part.py").write_text(f"def {name}(*args, **kwargs):\n    raise ValueError('on purpose')\n")
    with pytest.raises(SettingsError, match=r"on purpose \(my-part.py, line 2\)|must be a subclass of Engine|lr"):
        check(settings_with(setting, f"my-part.py:{name}"))


def test_muon_trains_neither_end_of_the_documented_network_and_a_network_without_marks_gets_a_warning(tmp_path):
    name, code = EXAMPLES["model.architecture"]
    path = tmp_path / "mine.py"
    path.write_text(code)
    settings = resolve("cpu-quick", [f"model.architecture={path}:{name}"])
    assert check(settings) == []
    model = build_model(settings.model, 10, 16)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_optimizer(settings.engine["optimizer"], model, fused=False).param_groups
    hidden = {names[id(parameter)] for group in groups if group["hidden"] for parameter in group["params"]}
    assert hidden == {"0.features.3.weight", "0.features.6.weight"}
    path.write_text(code.replace("is_input_or_output_layer", "unknown_mark"))
    (warning,) = check(settings)
    assert "optimizer.type=Muon trains its first and last layer too" in warning
    assert check(resolve("cpu-quick", [f"model.architecture={path}:{name}", "optimizer.type=AdamW"])) == []


PARTS = """\
from __future__ import annotations
from functools import partial
from typing import Literal
import torch
from torch import nn

class Linear(nn.Module):
    def __init__(self, dims, size: int = 0, bias: bool | None = None, sides: tuple[int, ...] = (1, 2),
                 kind: Literal["a", "b"] = "a", rate: float = 0.5):
        super().__init__()
        self.options = (size, bias, sides, kind, rate)
        self.linear = nn.Linear(dims.width, size or dims.width)

    def forward(self, x):
        return self.linear(x)

class Shorter(Linear):
    def forward(self, x):
        return x[:, 1:]

class Failing(Linear):
    def forward(self, x):
        return self.linear(x @ x)

class Double(Linear):
    def forward(self, x):
        return self.linear(x).double()

class Labels(Linear):
    def forward(self, x):
        return self.linear(x).long()

class ReadsValues(Linear):
    def forward(self, x):
        return x + float(x.sum())

def function(dims, size: int = 0):
    return Linear(dims, size)

factory = partial(Linear, rate=0.25)

def no_module(dims):
    return 3

class Net(nn.Module):
    def __init__(self, num_classes, extra=0):
        super().__init__()
        self.flat = nn.Linear(3 * 16 * 16, num_classes + extra)

    def forward(self, images):
        return self.flat(images.flatten(1))

def strange(images, classes):
    return Net(classes)

def layers(settings, num_classes, image_side):
    return [nn.Flatten(), nn.Linear(3 * image_side**2, settings.width), nn.Linear(settings.width, num_classes)]

class Fixed(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes

    def forward(self, images):
        return images.flatten(1)[:, : self.num_classes]

def undecided(groups, lr: float = 0.1, weight_decay: float | None = None):
    pass

def automatic(groups, lr: float = 0.1, eps="auto"):
    return torch.optim.SGD(groups, lr=lr)

number = 3
"""


@pytest.fixture
def own(tmp_path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(PARTS)
    return path


@pytest.mark.parametrize("name", ["Linear", "function", "factory", "ReadsValues"])
def test_a_part_is_a_class_a_function_or_a_factory_and_may_need_real_values(own, name):
    check(settings_with("model.feed_forward", f"{own}:{name}"))


@pytest.mark.parametrize(
    ("setting", "name", "sentence"),
    [
        ("model.attention", "Shorter", r"own.py:Shorter \(forward in line 18\): .* became \(2, 16, 16\), expected "),
        (
            "model.feed_forward",
            "Failing",
            r"a forward pass .* failed: RuntimeError: .* \(own.py, line 23\); it must map",
        ),
        ("model.feed_forward", "Double", r"own.py:Double \(.*\): it returned float64 for a float32 input; end "),
        ("model.attention", "Labels", "it returned int64 for a float32 input; end its forward with"),
        ("model.position", "no_module", "must return a torch.nn.Module, not int"),
        ("model.pooling", "Linear", r"became \(2, 16, 16\), expected \(2, 16\); it must map tokens \(B, T, C\) to one"),
        ("model.block", "no_module", "argument dims has no default and is none of branch, attention, feed_forward"),
        ("model.architecture", "strange", "images has no default and is none of settings, num_classes, image_side"),
        ("model.architecture", "Fixed", "own.py:Fixed: the network has no trainable parameters"),
        ("model.architecture", "number", "own.py:number is a int; name a class or a function"),
        ("model.architecture", "Nett", "unknown part of own.py 'Nett'; did you mean 'Net'"),
        ("optimizer.type", "Net", "needs an argument lr with a number as default"),
        ("optimizer.type", "undecided", "needs an argument weight_decay with a number as default"),
        ("schedule.shape", "no_module", r"schedule.shape=.*own.py:no_module: TypeError"),
    ],
)
def test_a_part_that_does_not_fit_is_one_sentence(own, setting, name, sentence):
    with pytest.raises(SettingsError, match=sentence):
        check(settings_with(setting, f"{own}:{name}"))


HIDDEN = """\
import torch
from torch import nn

class Part(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.linear = nn.Linear(dims.width, dims.width)
        {line}

    def forward(self, x):
        return self.linear(x)

class Nested(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.inner = Part(dims)

    def forward(self, x):
        return self.inner(x)

def network(settings, num_classes, image_side):
    return [nn.Flatten(), Part(settings), nn.Linear(settings.width, num_classes)]
"""


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("self.ls = [nn.Linear(2, 2)]", "self.ls of Part holds modules in a list, .*; use nn.ModuleList$"),
        ("self.ls = 1, (nn.ReLU(),)", "self.ls of Part holds modules in a tuple, .*; use nn.ModuleList$"),
        ("self.ls = {'a': [nn.ReLU()]}", "self.ls of Part holds modules in a dict, .*; use nn.ModuleDict$"),
        ("self.ls = [nn.Parameter(torch.ones(2))]", "holds parameters in a list, .*; use nn.ParameterList$"),
        ("self.w = torch.ones(2, requires_grad=True)", "self.w of Part holds a tensor .*; use nn.Parameter$"),
    ],
)
@pytest.mark.parametrize(
    ("setting", "name"),
    [("model.feed_forward", "Part"), ("model.attention", "Nested"), ("model.architecture", "network")],
)
def test_modules_and_parameters_that_are_not_registered_are_refused(tmp_path, setting, name, line, sentence):
    (tmp_path / "own.py").write_text(HIDDEN.replace("{line}", line))
    with pytest.raises(SettingsError, match=f"{setting}=.*own.py:{name}: .*{sentence}"):
        check(settings_with(setting, f"{tmp_path}/own.py:{name}"))


def test_a_list_may_name_registered_modules_and_hold_plain_values(tmp_path):
    line = "self.same, self.sizes, self.constant = [self.linear, self.linear.weight], [1, 2], [torch.ones(2)]"
    (tmp_path / "own.py").write_text(HIDDEN.replace("{line}", line))
    check(settings_with("model.feed_forward", f"{tmp_path}/own.py:Part"))


MISTAKES = """\
import torch
from torch import nn

class Linear(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.linear = nn.Linear(dims.width, dims.width)

    def forward(self, x):
        return self.linear(x)

class InPlace(Linear):
    def forward(self, x):
        return self.linear(x.add_(1))

class DividesByZero(Linear):
    def forward(self, x):
        return self.linear(x) / 0 * 0

class Detached(Linear):
    def forward(self, x):
        return self.linear(x).detach()

class Frozen(Detached):
    def __init__(self, dims):
        super().__init__(dims)
        self.requires_grad_(False)

class Unused(Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.linear.weight)

class MixesImages(Linear):
    def forward(self, x):
        return self.linear(x).mean(0, keepdim=True).expand_as(x)

class BatchNorm(Linear):
    def __init__(self, dims):
        super().__init__(dims)
        self.norm = nn.BatchNorm1d(dims.num_tokens)

    def forward(self, x):
        return self.norm(self.linear(x))

class Noisy(Linear):
    def forward(self, x):
        return self.linear(x) + torch.randn_like(x)

class TupleInEvaluation(Linear):
    def forward(self, x):
        return self.linear(x) if self.training else (self.linear(x), x)

class NoBackward(Linear):
    def forward(self, x):
        y = self.linear(x).exp()
        y.clone().add_(y.mul_(2))
        return y

class OnlyOnGPU(Linear):
    def forward(self, x):
        if x.device.type == "cpu":
            raise RuntimeError("no kernel for the CPU")
        return self.linear(x)

class Net(MixesImages):
    def __init__(self, num_classes, image_side, hidden: int = 8):
        nn.Module.__init__(self)
        self.hidden = nn.Linear(3 * image_side**2, hidden)
        self.linear = nn.Linear(hidden, num_classes)

    def forward(self, images):
        scores = self.linear(self.hidden(images.flatten(1)))
        return scores - scores.mean(0)

def block(branch, attention, feed_forward):
    attention()
    unused = branch(feed_forward())
    unused.forward = lambda x: x
    return {"attention": branch(attention()), "unused": unused}
"""


@pytest.fixture
def mistakes(tmp_path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(MISTAKES)
    return path


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("InPlace", r"own.py:InPlace \(forward in line 13\): it changes its input in place; replace x.add_\(1\)"),
        ("DividesByZero", "its result has NaN or infinite values for normally distributed inputs"),
        ("TupleInEvaluation", "it must return one tensor, not tuple"),
        ("NoBackward", "failed: RuntimeError: one of the variables needed for gradient computation has been modified"),
        ("OnlyOnGPU", r"failed: RuntimeError: no kernel for the CPU \(own.py, line 6\d\); it must map tokens"),
    ],
)
@pytest.mark.parametrize("kind", ["feed_forward", "attention", "position"])
def test_a_real_pass_refuses_what_shapes_do_not_show(mistakes, kind, name, sentence):
    with pytest.raises(SettingsError, match=f"model.{kind}=.*{sentence}"):
        check(settings_with(f"model.{kind}", f"{mistakes}:{name}"))


def test_a_part_that_needs_a_gpu_gets_no_pass_on_the_cpu(mistakes, monkeypatch):
    monkeypatch.setattr("training.own_part_checks.pick_device", lambda: torch.device("cuda"))
    assert check(settings_with("model.feed_forward", f"{mistakes}:OnlyOnGPU")) == []


@pytest.mark.parametrize(
    ("setting", "name", "sentence"),
    [
        ("model.feed_forward", "Detached", "no gradient reaches the parameters 'linear.weight', 'linear.bias'; use"),
        ("model.attention", "Unused", "no gradient reaches the parameters 'linear.bias'; use them"),
        ("model.position", "MixesImages", "the result of an image depends on the other images of its batch"),
        ("model.architecture", "Net", "the result of an image depends on the other images of its batch"),
        ("model.block", "block", "in the whole network: no gradient reaches the parameters '1.unused.norm.weight', "),
    ],
)
def test_a_real_pass_warns_of_what_may_be_meant(mistakes, setting, name, sentence):
    (warning,) = check(settings_with(setting, f"{mistakes}:{name}"))
    assert warning.startswith(f"{setting}={mistakes}:{name}") and sentence in warning


@pytest.mark.parametrize("name", ["Linear", "Frozen", "BatchNorm", "Noisy"])
def test_a_real_pass_accepts_frozen_parameters_batch_norm_and_noise(mistakes, name):
    before = torch.get_rng_state()
    assert check(settings_with("model.feed_forward", f"{mistakes}:{name}")) == []
    assert torch.equal(before, torch.get_rng_state())


def test_a_large_network_gets_no_real_pass(mistakes):
    size = "model.architecture_options.hidden=200000"
    assert check(settings_with("model.architecture", f"{mistakes}:Net", size)) == []


def test_warnings_are_printed_by_model_py(mistakes, monkeypatch, capsys):
    words = ["--set", f"model.feed_forward={mistakes}:Detached", "--set", "model.depth=1"]
    monkeypatch.setattr("sys.argv", ["model.py", *words])
    describe_model()
    assert capsys.readouterr().err.startswith(f"warning: model.feed_forward={mistakes}:Detached")


EXITS = """\
import sys
from torch import nn

def leave(*args, **kwargs):
    sys.exit(0)

class Forward(nn.Module):
    def __init__(self, dims):
        super().__init__()

    def forward(self, x):
        leave()

class OnCPU(Forward):
    def forward(self, x):
        return x if x.is_meta else leave()

def leave_with(groups, lr: float = 0.1):
    leave()
"""


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        *((setting, "leave") for setting in REGISTRIES if setting not in ("strategy", "optimizer.type")),
        ("model.feed_forward", "Forward"),
        ("model.position", "OnCPU"),
        ("optimizer.type", "leave_with"),
    ],
)
def test_a_part_that_ends_the_process_is_one_sentence(tmp_path, setting, name):
    (tmp_path / "own.py").write_text(EXITS)
    settings = settings_with(setting, f"{tmp_path}/own.py:{name}")
    check_parts(settings)
    with pytest.raises(
        SettingsError, match=rf"{setting.split('.')[-1]}=.*own.py:{name}.*SystemExit: 0 \(own.py, line 5"
    ):
        check(settings)


@pytest.mark.parametrize(
    ("lr", "groups", "sentence"),
    [
        ("3e38", "groups", "one step from gradients of 1 made weights that are not finite"),
        ("0.1", "[p for group in groups for p in group['params']]", "it must keep the parameter groups that it is"),
    ],
)
def test_an_optimizer_that_cannot_train_is_refused(tmp_path, lr, groups, sentence):
    (tmp_path / "mine.py").write_text(
        f"import torch\ndef own(groups, lr: float = {lr}):\n    return torch.optim.SGD({groups}, lr=lr)\n"
    )
    with pytest.raises(SettingsError, match=sentence):
        check(settings_with("optimizer.type", f"{tmp_path / 'mine.py'}:own"))


def test_an_optimizer_may_have_an_eps_that_is_no_number(own):
    assert check(settings_with("optimizer.type", f"{own}:automatic")) == []


@pytest.mark.parametrize(
    ("option", "wanted"),
    [("size=1.5", "int"), ("bias=3", "bool"), ("sides=2", "tuple"), ("kind=c", "Literal"), ("rate=high", "float")],
)
def test_options_have_the_type_of_their_annotation(own, option, wanted):
    with pytest.raises(SettingsError, match=f"option {option.split('=')[0]} must be of type .*{wanted}"):
        check(settings_with("model.feed_forward", f"{own}:Linear", f"model.feed_forward_options.{option}"))


def test_options_arrive_with_the_type_of_their_annotation(own):
    given = ["bias=false", "sides=[3,4]", "kind=b", "rate=1"]
    overrides = [f"model.feed_forward_options.{text}" for text in given]
    settings = settings_with("model.feed_forward", f"{own}:Linear", *overrides)
    with torch.device("meta"):
        part = build_model(settings.model, 10, 16)[1].feed_forward.part
    assert part.options == (0, False, (3, 4), "b", 1.0) and isinstance(part.options[-1], float)


def test_a_whole_network_has_options_or_settings_but_none_without_effect(own):
    check(resolve(None, [f"model.architecture={own}:Net"]))
    check(resolve(None, [f"model.architecture={own}:layers", "model.width=8"]))
    with pytest.raises(SettingsError, match=r"became \(2, 11\), expected \(2, 10\); it must map images"):
        check(resolve(None, [f"model.architecture={own}:Net", "model.architecture_options.extra=1"]))
    with pytest.raises(SettingsError, match="does not use model.width=8"):
        check(resolve(None, [f"model.architecture={own}:Net", "model.width=8"]))
    with pytest.raises(SettingsError, match="model.architecture=vit has no options"):
        build_model(resolve(None, ["model.architecture_options.extra=1"]).model, 10, 16)


def test_before_the_data_a_network_is_checked_with_the_sizes_that_are_known(own, tmp_path):
    settings = resolve(None, [f"model.architecture={own}:Net"])
    check_before_data(settings, tmp_path / "unknown", None)  # its image side may be 16
    with pytest.raises(
        SettingsError, match=re.escape("mat1 and mat2 shapes cannot be multiplied (2x3072 and 768x100)")
    ):
        check_before_data(settings, None, "cifar100")
    settings.image_side = 16
    check_before_data(settings, None, "cifar100")
