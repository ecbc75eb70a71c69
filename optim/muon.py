"""Muon (kellerjordan.github.io/posts/muon, arXiv 2502.16982): orthogonalized momentum for hidden matrices.

    M <- momentum M + (1 - momentum) G          U <- orthogonalize(Nesterov combination of G and M)
    W <- (1 - lr decay) W - lr matrix_lr_factor 0.2 sqrt(max(rows, columns)) U

The last factors scale the step to the size of an AdamW step, so both share learning rate and weight decay. With
`matrix_lr_factor` the steps of the matrices are larger or smaller, but their decay is not. The same object trains all
other parameters with AdamW. Without that factor the result equals torch.optim.Muon, which processes one unsharded
matrix at a time. This implementation batches all matrices of one shape (the blocks of a transformer have equal shapes)
and supports sharded matrices: the momentum stays sharded; only the step is gathered, orthogonalized and sharded again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

# Coefficients of the quintic iteration, chosen by its author so that small singular values grow fast.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class MatrixSharding(ABC):
    """How a tensor that the optimizer updates in this process holds shards of parameters."""

    @abstractmethod
    def whole(self, part: Tensor) -> list[Tensor]:
        """Return the unsharded tensors, given this process's shard of all of them. Collective."""

    @abstractmethod
    def part(self, whole: Sequence[Tensor]) -> Tensor:
        """Return this process's shard of them."""


class Unsharded(MatrixSharding):
    """A tensor that is one whole parameter."""

    def whole(self, part: Tensor) -> list[Tensor]:
        return [part]

    def part(self, whole: Sequence[Tensor]) -> Tensor:
        return whole[0]


class Muon(torch.optim.Optimizer):
    """Muon for groups with `hidden` true, AdamW for the others.

    Matrices of a group with `row_splits`, such as (C, C, C), are split into matrices of so many rows first. A tensor
    of three dimensions is a stack of matrices; in a group with `is_conv1d` it is one kernel.

    Attributes:
        shardings: how the tensors of the hidden groups hold matrices, by tensor; a missing tensor is one whole matrix.
        compiled: whether the iteration is compiled; an engine that compiles the network on a GPU sets it.
        working_dtype: dtype of the iteration; None: see `working_dtype`.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        matrix_lr_factor: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        fused: bool = False,
    ):
        if not 0 <= momentum < 1 or matrix_lr_factor <= 0:
            raise ValueError(
                f"momentum must be from 0 to below 1 and matrix_lr_factor above 0, got momentum={momentum}, "
                f"matrix_lr_factor={matrix_lr_factor}"
            )
        super().__init__(
            params, dict(lr=lr, momentum=momentum, matrix_lr_factor=matrix_lr_factor, weight_decay=weight_decay)
        )
        self.shardings: dict[Tensor, MatrixSharding] = {}
        self.compiled = False
        self.working_dtype: torch.dtype | None = None
        # Shares the groups (the same dictionaries) and the state: an engine that swaps parameters sees one optimizer.
        rest = [group for group in self.param_groups if not group["hidden"]]
        self.adamw = (
            torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
            if rest
            else None
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # without the overload for a closure
        for group in self.param_groups:
            if group["hidden"]:
                self._step_hidden(group)
        if self.adamw is not None:
            # DeepSpeed shows the optimizer one group at a time.
            self.adamw.param_groups = [group for group in self.param_groups if not group["hidden"]]
            self.adamw.state = self.state
            self.adamw.step()

    def _step_hidden(self, group: dict[str, Any]) -> None:
        tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
        if not tensors:
            return
        cuts = [self.shardings.get(tensor, Unsharded()) for tensor in tensors]
        directions = self._directions(tensors, group["momentum"])
        matrices = [cut.whole(direction) for direction, cut in zip(directions, cuts, strict=True)]
        unsharded = [matrix for of_tensor in matrices for matrix in of_tensor]
        splits = group.get("row_splits")
        parts = [part for matrix in unsharded for part in (matrix.split(splits) if splits else (matrix,))]
        made = iter(orthogonalize(parts, self.compiled, self.working_dtype, group.get("is_conv1d", False)))
        if splits:
            made = iter([torch.cat([next(made) for _ in splits]) for _ in unsharded])
        steps = [cut.part([next(made) for _ in of_tensor]) for cut, of_tensor in zip(cuts, matrices, strict=True)]
        decay, rate = 1 - group["lr"] * group["weight_decay"], -group["lr"] * group["matrix_lr_factor"]
        if all_plain([*tensors, *steps]):
            torch._foreach_mul_(tensors, decay)
            torch._foreach_add_(tensors, steps, alpha=rate)
            return
        for tensor, step in zip(tensors, steps, strict=True):
            tensor.mul_(decay)
            tensor.add_(step, alpha=rate)

    def _directions(self, tensors: list[Tensor], momentum: float) -> list[Tensor]:
        """Update the momentum by the gradients and return the Nesterov combination of both."""
        for tensor in tensors:
            if "momentum_buffer" not in self.state[tensor]:
                self.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)
        means = [self.state[tensor]["momentum_buffer"] for tensor in tensors]
        gradients = [cast("Tensor", tensor.grad) for tensor in tensors]
        if all_plain([*means, *gradients]):
            torch._foreach_lerp_(means, gradients, 1 - momentum)
            return list(torch._foreach_lerp(gradients, means, momentum))
        pairs = zip(means, gradients, strict=True)
        return [gradient.lerp(mean.lerp_(gradient, 1 - momentum), momentum) for mean, gradient in pairs]


def all_plain(tensors: Sequence[Tensor]) -> bool:
    """Return whether foreach kernels may update them: plain tensors on a GPU. On a CPU foreach is a loop anyway."""
    return all(type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cuda for tensor in tensors)


def orthogonalize(
    tensors: list[Tensor], compiled: bool = False, dtype: torch.dtype | None = None, is_conv1d: bool = False
) -> list[Tensor]:
    """Replace each matrix U S V^T by approximately U V^T, times 0.2 sqrt(max(rows, columns)).

    A tensor (N, rows, columns) is N matrices; a kernel (out, in, k, k) is one matrix (out, in k k), and with
    `is_conv1d` so is a kernel (out, in, k). Matrices of one shape are iterated as a batch; tall ones are transposed.
    `dtype` as Muon's `working_dtype`.
    """
    stacks = [tensor if tensor.ndim == 3 and not is_conv1d else tensor.flatten(1)[None] for tensor in tensors]
    tall = [stack.shape[1] > stack.shape[2] for stack in stacks]
    lying = [stack.mT if is_tall else stack for stack, is_tall in zip(stacks, tall, strict=True)]
    batches: dict[tuple, list[int]] = defaultdict(list)
    for i, stack in enumerate(lying):
        batches[(*stack.shape[1:], stack.device)].append(i)
    steps: list[Tensor] = [torch.empty(0)] * len(tensors)
    for (_, longer, device), members in batches.items():
        iterate = compiled_newton_schulz() if compiled and device.type == "cuda" else newton_schulz
        batch = iterate(torch.cat([lying[i] for i in members]), dtype or working_dtype(device))
        scaled = (0.2 * longer**0.5 * batch).to(tensors[0].dtype)
        for i, step in zip(members, scaled.split([len(lying[i]) for i in members]), strict=True):
            steps[i] = (step.mT if tall[i] else step).reshape(tensors[i].shape)
    return steps


def working_dtype(device: torch.device) -> torch.dtype:
    """Return bf16, as in the author's code; fp32 on a CPU and on GPUs before Ampere, where it is faster."""
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return torch.bfloat16 if has_bf16 else torch.float32


def newton_schulz(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Iterate (N, rows, columns), rows <= columns, until singular values are about 0.7 to 1.2; same shape."""
    a, b, c = NEWTON_SCHULZ
    x = x.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@cache
def compiled_newton_schulz() -> Callable[[Tensor, torch.dtype], Tensor]:
    """Return the compiled iteration, one compilation per shape; element-wise work between products is then fused."""
    return torch.compile(newton_schulz, dynamic=False)
