"""Muon (kellerjordan.github.io/posts/muon, arXiv 2502.16982): hidden matrices move by an orthogonalised momentum.

    M <- momentum M + (1 - momentum) G          U <- orthogonalise(G and M, mixed as Nesterov does)
    W <- (1 - lr decay) W - lr 0.2 sqrt(max(rows, columns)) U

The factor gives the step the size of one of AdamW's, whose rate and decay it shares. What is no hidden matrix is trained
by AdamW in the same object. It equals torch.optim.Muon, which takes one whole matrix after the other; this one takes all
matrices of one shape at once (the blocks of a transformer are alike), and takes matrices that are cut over processes:
the momentum stays cut, and only the step is made whole, orthogonalised, and cut again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # of the quintic iteration, chosen by its author to bring small singular values up fast
NEWTON_SCHULZ_STEPS = 5


class MatrixSharding(ABC):
    """How a tensor that the optimiser updates in this process holds parts of whole parameters."""

    @abstractmethod
    def whole(self, part: Tensor) -> list[Tensor]:
        """The whole tensors, given this process's part of all of them. Collective."""

    @abstractmethod
    def part(self, whole: Sequence[Tensor]) -> Tensor:
        """This process's part of them."""


class Unsharded(MatrixSharding):
    """A tensor that is a parameter."""

    def whole(self, part: Tensor) -> list[Tensor]:
        return [part]

    def part(self, whole: Sequence[Tensor]) -> Tensor:
        return whole[0]


class Muon(torch.optim.Optimizer):
    """Groups with `hidden` true are trained by Muon, the others by AdamW.

    Attributes:
        shardings: how the tensors of the hidden groups hold matrices, by tensor; a tensor that is not here is a whole one.
        compiled: whether the iteration is compiled; an engine that compiles the network on a GPU sets it.
        working_dtype: in which the iteration computes; None: bf16 on a GPU, as its author has it, and fp32 on a CPU.
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
                f"momentum={momentum} and matrix_lr_factor={matrix_lr_factor}: it needs 0 <= momentum < 1, and a factor above 0"
            )
        super().__init__(
            params, dict(lr=lr, momentum=momentum, matrix_lr_factor=matrix_lr_factor, weight_decay=weight_decay)
        )
        self.shardings: dict[Tensor, MatrixSharding] = {}
        self.compiled = False
        self.working_dtype: torch.dtype | None = None
        # It shares the groups (the same dictionaries) and the state, so an engine that exchanges parameters sees one optimiser.
        rest = [group for group in self.param_groups if not group["hidden"]]
        self.adamw = (
            torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
            if rest
            else None
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if group["hidden"]:
                self._step_hidden(group)
        if self.adamw is not None:
            # DeepSpeed lets the optimiser see one of its groups after the other.
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
        made = iter(
            orthogonalise([matrix for of_tensor in matrices for matrix in of_tensor], self.compiled, self.working_dtype)
        )
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
        """The momentum follows the gradients; Nesterov's mixture of both."""
        for tensor in tensors:
            if "momentum_buffer" not in self.state[tensor]:
                self.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)
        means = [self.state[tensor]["momentum_buffer"] for tensor in tensors]
        gradients = [tensor.grad for tensor in tensors]
        if all_plain([*means, *gradients]):
            torch._foreach_lerp_(means, gradients, 1 - momentum)
            return list(torch._foreach_lerp(gradients, means, momentum))
        pairs = zip(means, gradients, strict=True)
        return [gradient.lerp(mean.lerp_(gradient, 1 - momentum), momentum) for mean, gradient in pairs]


def all_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether one kernel may update them all: plain tensors of a GPU. On a CPU it would be a loop, too."""
    return all(type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cuda for tensor in tensors)


def orthogonalise(tensors: list[Tensor], compiled: bool = False, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Each matrix U S V^T as about U V^T, times 0.2 sqrt(max(rows, columns)).

    Of (N, rows, columns) every one of the N is a matrix, and a kernel (out, in, k, k) is one of (out, in k k). Matrices of
    one shape go through the iteration together, a tall one lying on its side. `dtype` as Muon's `working_dtype`.
    """
    stacks = [tensor if tensor.ndim == 3 else tensor.flatten(1)[None] for tensor in tensors]
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
    """bf16, as its author has it; on a CPU fp32, which is faster on most."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def newton_schulz(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, rows, columns), rows <= columns -> the same with singular values between about 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    x = x.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


@cache
def compiled_newton_schulz() -> Callable[[Tensor, torch.dtype], Tensor]:
    """One compilation for each shape of a stack; the element-wise work between the products is one kernel then."""
    return torch.compile(newton_schulz, dynamic=False)
