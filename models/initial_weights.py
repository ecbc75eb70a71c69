"""Initial weights from a file: `load_initial_weights(model, source)`, used by `train.py --init-weights SOURCE`.

Input: safetensors, or a plain state_dict saved by torch.save (.pt, .pth, .bin), also nested under "state_dict" or
"model". Tensors have this project's names ("0.patches.project.weight") or those of the wrapped library (timm,
torchvision). Output: tensors of the model overwritten where names and shapes match, and a report of all others.
The head keeps its random initialization when the number of classes differs. No code in a file is executed.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import SettingsError
from models.pretrained import local_file

Weights = dict[str, Tensor]

NESTS = ("state_dict", "model_state_dict", "model")  # keys under which training programs store the state_dict
WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile
SAFE_TORCH = (2, 6)  # first PyTorch in which `weights_only` is safe (CVE-2025-32434)
SHOWN = 20  # names per line of the report


def load_initial_weights(model: nn.Sequential, source: str | Path) -> list[str]:
    """Copy weights into `model` and return a report: tensors loaded, resampled, missing and unused.

    Args:
        source: a file, or a name of `models/pretrained.py`.

    Raises:
        SettingsError: the file cannot be read safely, or it has no tensor of this network besides the head.
    """
    path = local_file(str(source))
    stored = read_weights(path)
    weights = to_our_names(model, stored, path)
    ours, theirs, head, tables = model.state_dict(), external_names(model), head_names(model), position_tables(model)
    fitting: Weights = {}
    replaced: list[str] = []
    resampled: list[str] = []
    misfits: list[str] = []
    for name in ours.keys() & weights.keys():
        old, new = weights[name], ours[name]
        fits = old if old.shape == new.shape else None
        if fits is None and name in tables:
            fits = resample_positions(old, new.shape, tables[name])
        old = stored.get(name, stored.get(theirs.get(name, name), old))  # as it is in the file
        change = f"{name} {tuple(old.shape)} -> {tuple(new.shape)}"
        if fits is None:
            (replaced if name in head and old.shape[:1] != new.shape[:1] else misfits).append(change)
            continue
        fitting[name] = fits
        if old.shape != new.shape:
            resampled.append(change)
    if not fitting.keys() - head:
        raise SettingsError(nothing_fits(source, list(stored), list(ours)))
    for name, tensor in fitting.items():
        ours[name].copy_(tensor)
    share = sum(ours[name].numel() for name in fitting) / sum(tensor.numel() for tensor in ours.values())
    return [
        f"{source}: {len(fitting)} of {len(ours)} tensors loaded, {100 * share:.1f}% of the values",
        *line("head randomly initialized, the number of classes differs", replaced),
        *line("resampled to this image side or patch", resampled),
        *line("randomly initialized, other shape in the file", misfits),
        *line("randomly initialized, not in the file", ours.keys() - weights.keys()),
        *line("in the file, not used", weights.keys() - ours.keys()),
    ]


def read_weights(path: Path) -> Weights:
    """Return the named tensors of a file, without the nesting and prefixes that training programs add."""
    tree = read_safetensors(path) if path.suffix == ".safetensors" else read_torch_file(path)
    while isinstance(tree, dict) and any(isinstance(tree.get(nest), dict) for nest in NESTS):
        tree = next(tree[nest] for nest in NESTS if isinstance(tree.get(nest), dict))
    weights = {}
    for name, tensor in tree.items() if isinstance(tree, dict) else ():
        if isinstance(name, str) and isinstance(tensor, Tensor):
            while name.startswith(WRAPPERS):
                name = name.removeprefix(next(wrapper for wrapper in WRAPPERS if name.startswith(wrapper)))
            weights[name] = tensor
    if not weights:
        raise SettingsError(
            f"--init-weights {path} has no named tensors. Save a state_dict: torch.save(model.state_dict(), FILE)"
        )
    return weights


def read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SettingsError(
            f"--init-weights {path} cannot be read as safetensors ({error}). Download or save it again"
        ) from error


def read_torch_file(path: Path) -> Any:
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise SettingsError(
            f"--init-weights {path}: PyTorch {torch.__version__} may run code from a torch.save file (CVE-2025-32434). "
            "Give the weights as safetensors, or install PyTorch 2.6 or newer"
        )
    try:
        # weights_only: a restricted unpickler that reads tensors and plain containers only
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SettingsError(
            f"--init-weights {path} is damaged, or has pickled Python objects besides tensors, which could run code. "
            "If you trust it, save its tensors only: torch.save(model.state_dict(), FILE), or as safetensors"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise SettingsError(
            f"--init-weights {path} is not a file of torch.save ({error}). Give one, or a file *.safetensors"
        ) from error


def to_our_names(model: nn.Sequential, weights: Weights, path: Path) -> Weights:
    """Return the tensors under the names of `model.state_dict()`, where they can be mapped.

    A layer that wraps a library's module has `name_prefixes = (ours, theirs)`, the prefixes of both naming schemes.
    A layer that can convert more (image sides, older checkpoint formats) has `adapt_weights`, which maps the library's
    names to the library's names.
    """
    theirs = external_names(model)
    weights = {theirs.get(name, name): tensor for name, tensor in weights.items()}
    layer: Any
    for layer in model:
        if hasattr(layer, "adapt_weights"):
            try:
                weights = layer.adapt_weights(weights)
            except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, AssertionError) as error:
                raise SettingsError(
                    f"--init-weights {path} has weights of another network ({error}). Set model.architecture to it"
                ) from error
    ours = {their: our for our, their in theirs.items()}
    return {ours.get(name, name): tensor for name, tensor in weights.items()}


def external_names(model: nn.Sequential) -> dict[str, str]:
    """Return our name -> the library's name, for every tensor of a wrapped module."""
    names = {}
    layer: Any
    for i, layer in model.named_children():
        if hasattr(layer, "name_prefixes"):
            our_prefix, their_prefix = layer.name_prefixes
            names.update({f"{i}.{name}": their_prefix + name.removeprefix(our_prefix) for name in layer.state_dict()})
    return names


def head_names(model: nn.Sequential) -> set[str]:
    """Return the names of the classifier's tensors: those of `head_modules` of a layer, else of the last linear map."""
    layers: list[Any] = list(model)
    heads = [head for layer in layers if hasattr(layer, "head_modules") for head in layer.head_modules()]
    heads = heads or [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    paths = [path for path, module in model.named_modules() if any(module is head for head in heads)]
    return {f"{path}.{name}" for path in paths for name in model.get_submodule(path).state_dict()}


def position_tables(model: nn.Sequential) -> dict[str, int]:
    """Return the tables with one vector per token, which modules name in `position_tables`: name -> `num_prefix`.

    Tables of wrapped libraries are resampled by `adapt_weights`.
    """
    return {
        f"{path}.{name}": getattr(module, "num_prefix", 0)
        for path, module in model.named_modules()
        for name in getattr(module, "position_tables", ())
    }


def resample_positions(table: Tensor, shape: torch.Size, num_prefix: int = 0) -> Tensor | None:
    """Resample a position table, (tokens, C) or (side, side, C), to another image side; None if it cannot be one.

    The first `num_prefix` tokens, such as a CLS token, are before those of the grid and keep their positions.
    """
    if table.ndim != len(shape) or table.ndim not in (2, 3) or table.shape[-1] != shape[-1]:
        return None
    if table.ndim == 3:
        return resample_grid(table, shape[0]) if table.shape[0] == table.shape[1] and shape[0] == shape[1] else None
    places = (len(table) - num_prefix, shape[0] - num_prefix)
    before, after = (math.isqrt(max(1, count)) for count in places)
    if places != (before**2, after**2):
        return None
    grid = resample_grid(table[num_prefix:].reshape(before, before, -1), after)
    return torch.cat([table[:num_prefix].float(), grid.flatten(0, 1)])


def resample_grid(grid: Tensor, side: int) -> Tensor:
    """Resample a grid bicubically, (h, h, C) -> (side, side, C)."""
    images = grid.float().permute(2, 0, 1)[None]
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)[0].permute(1, 2, 0)


def line(what: str, names: Any) -> list[str]:
    """Return one line of the report, or none without names."""
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"  {what}: {', '.join(names[:SHOWN])}{more}"] if names else []


def nothing_fits(path: str | Path, theirs: list[str], ours: list[str]) -> str:
    return (
        f"--init-weights {path} matches no tensor of this network except perhaps its head: the file has {len(theirs)} "
        f"tensors such as '{theirs[0]}', the network {len(ours)} such as '{ours[0]}'. Set model.architecture and its "
        "sizes to those of the file"
    )
