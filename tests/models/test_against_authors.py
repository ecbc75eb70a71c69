"""Outputs of published networks and parts, as recorded when they were equal to those of their authors' code.

The outputs were recorded with commit 5db9433 of this project. At that commit they were compared with the authors' code:
Compact-Transformers cd11f09, SPT_LSA_ViT 54bd796, DHVT a86feda, iFormer 725d8e7, UltraFastBERT 295c7b6, vmoe 942a78b,
rope-vit ce85c2e, Decent-DP 8749e97. The largest difference was 1e-7 and mostly 1e-15. Weights and images are drawn in
float64 from a seed that follows from the tensor's name, so a recorded number depends on the formula only.

    pytest tests/models/test_against_authors.py      no GPU, no data, some seconds
"""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import Tensor, nn

TINY = dict(width=16, depth=2, heads=2, head_size=8, patch=4, attention="softmax", position="learned", dropout=0.0)
FFF = dict(feed_forward="fff", feed_forward_options={"depth": 3})
# name: fields of ModelSettings, image side
CASES: dict[str, tuple[dict, int]] = {
    "cct-7-3x1": (dict(architecture="cct-7-3x1"), 32),
    "sl-vit": (dict(architecture="sl-vit"), 32),
    "dhvt-t-4": (dict(architecture="dhvt-t-4"), 32),
    "dhvt-t-2": (dict(architecture="dhvt-t-2"), 16),
    "dhvt-s-4": (dict(architecture="dhvt-s-4"), 16),
    "dhvt-s-2": (dict(architecture="dhvt-s-2"), 8),
    "iformer-small": (dict(architecture="iformer-small"), 32),
    "iformer-base": (dict(architecture="iformer-base"), 32),
    "iformer-large": (dict(architecture="iformer-large"), 32),
    "fff, UltraFastBERT": (TINY | FFF, 16),
    "soft_moe, vmoe": (TINY | dict(feed_forward="soft_moe", feed_forward_options={}), 16),
    "geglu": (TINY | dict(feed_forward="geglu", feed_forward_options={}), 16),
    "swiglu": (TINY | dict(feed_forward="swiglu", feed_forward_options={}), 16),
    "qk_norm": (TINY | dict(attention="qk_norm"), 16),
    "rotary, rope-vit": (TINY | dict(position="rotary"), 16),
    "sin_cos, MoCo v3": (TINY | dict(position="sin_cos"), 16),
}
# The first three class scores of the first image, and the mean square of all scores.
RECORDED: dict[str, list[float]] = {
    "cct-7-3x1": [-0.783301363682, 2.04448114991, 0.811456065944, 1.03629891483],
    "sl-vit": [-1.33838927969, -0.783733780898, 1.07526395463, 1.87491267072],
    "dhvt-t-4": [0.24281348627, 0.388447347835, 1.28496626513, 1.28861663884],
    "dhvt-t-2": [1.10597338729, 1.0019005806, -0.494376442384, 1.05594596037],
    "dhvt-s-4": [-0.59671296739, -0.903560525952, 0.0253956452492, 0.59993685433],
    "dhvt-s-2": [0.735785556724, 0.87157805762, -0.163165122335, 0.922653112112],
    "iformer-small": [-0.853163302249, -0.836847781027, 2.08829501222, 1.80890606996],
    "iformer-base": [-0.307501385579, -0.975670499715, -0.654145613863, 1.54984152525],
    "iformer-large": [-1.32786630773, 1.51213418726, 1.68413342198, 1.19728977393],
    "fff, UltraFastBERT": [-1.31702647024, 0.520161149176, 0.575817747766, 0.443134210565],
    "soft_moe, vmoe": [-0.0994619429515, -0.563483836151, 0.624109499192, 0.781812603131],
    "geglu": [1.14417009262, -0.176194339951, -2.43806562642, 1.9484646305],
    "swiglu": [-0.556423840527, 0.423848505307, 0.208979923981, 0.838255253877],
    "qk_norm": [-0.556284121276, 0.139869352309, -0.204238735312, 0.600858700505],
    "rotary, rope-vit": [1.09749336078, -1.4159050673, 0.44025025419, 2.2241555935],
    "sin_cos, MoCo v3": [-0.367173455696, 0.211983774022, 0.0690278943495, 0.926349549776],
}


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers that follow from the name of a tensor, float64."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def outputs(case: str, model: nn.Module, side: int) -> list[float]:
    """Give the model drawn weights and statistics, and return what RECORDED has of its scores for two drawn images."""
    model = model.double().eval()
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        value = draw(f"{case}: {name}", tuple(tensor.shape))
        if tensor.ndim > 1:
            value /= tensor[0].numel() ** 0.5
        elif name.rpartition(".")[2] in ("weight", "scale", "factor", "running_var"):
            value = 1 + 0.3 * value.tanh()
        else:
            value *= 0.3
        tensor.copy_(value)
    scores = model(draw(f"{case}: images", (2, 3, side, side)))
    return [*scores[0, :3].tolist(), scores.square().mean().item()]


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_recorded_when_they_equaled_the_authors_code(case):
    from config.settings import ModelSettings
    from model import build_model

    settings, side = CASES[case]
    model = build_model(ModelSettings(**settings), 10, side)
    assert outputs(case, model, side) == pytest.approx(RECORDED[case], rel=1e-9, abs=1e-10)
