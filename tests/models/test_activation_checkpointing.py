"""model.checkpoint_blocks: the same bits with less memory, also with dropout, autocast and BatchNorm."""

from __future__ import annotations

import pytest
import torch
from networks import images, tiny
from torch import Tensor, nn

from common.errors import SettingsError
from config.settings import ModelSettings
from model import build_model
from models.activation_checkpointing import checkpoint_blocks, checkpoint_layer


class WithStatistics(nn.Module):
    """A block with BatchNorm, which counts its batches, and a table that is not trained."""

    table: Tensor

    def __init__(self):
        super().__init__()
        self.convolve, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.register_buffer("table", torch.rand(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.convolve(x))) * self.table


def with_batch_norm(checkpointed: bool) -> nn.Sequential:
    torch.manual_seed(0)
    shared = torch.rand(3, 1, 1)
    network = nn.Sequential(nn.Conv2d(3, 3, 1), WithStatistics(), WithStatistics(), nn.Flatten(), nn.LazyLinear(5))
    for block in network[1:3]:
        block.table = shared  # one table that several blocks use
        if checkpointed:
            checkpoint_layer(block)
    network(images())
    return network


def vision_transformer(checkpointed: bool) -> nn.Sequential:
    return tiny(dropout=0.2, drop_path=0.4, layer_scale=0.1, checkpoint_blocks=checkpointed)


def trained(network: nn.Sequential, bf16: bool) -> tuple[list[Tensor], int]:
    """Return gradients and state after two accumulated batches, the next random number, and the bytes kept."""
    saved = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t)
    network.train()
    torch.manual_seed(7)
    for _ in range(2):
        with keep, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = network(images())
        scores.float().square().sum().backward()
    return [*(p.grad for p in network.parameters()), *network.state_dict().values(), torch.rand(3)], sum(saved)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("build", [vision_transformer, with_batch_norm])
def test_gradients_and_statistics_have_the_same_bits_and_less_is_kept(build, bf16):
    (plain, plain_bytes), (checkpointed, few_bytes) = (trained(build(is_on), bf16) for is_on in (False, True))
    for a, b in zip(plain, checkpointed, strict=True):
        assert a is b or torch.equal(a, b)
    assert few_bytes < 0.7 * plain_bytes


def test_names_and_evaluation_do_not_change():
    plain, checkpointed = vision_transformer(False), vision_transformer(True)
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    assert [type(layer).__name__ for layer in plain] == [type(layer).__name__ for layer in checkpointed]
    calls = []
    checkpointed[1].attention.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(plain.eval()(images()), checkpointed.eval()(images())) and len(calls) == 1
    checkpointed.train()(images()).sum().backward()
    assert len(calls) == 3  # the forward pass and its recomputation


def test_published_networks_can_and_a_network_without_blocks_is_refused():
    layers = build_model(ModelSettings(architecture="cct-7-3x1", checkpoint_blocks=True), 5, 32)
    assert type(layers[1]) is not type(build_model(ModelSettings(architecture="cct-7-3x1"), 5, 32)[1])
    assert type(layers[0]).__name__ == "Tokenizer"
    with pytest.raises(SettingsError, match="model.checkpoint_blocks=true needs .* model.architecture=timm:x is not"):
        checkpoint_blocks([nn.Linear(2, 2)], "timm:x")
