"""Layout of matrices in the flat tensors that ZeRO's optimizers update, for Muon, which needs full matrices.

Every step gathers the updates of all hidden matrices from all processes: as many numbers as the matrices have. Every
process orthogonalizes all of them and keeps its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.muon import MatrixSharding


class FlatSharding(MatrixSharding):
    """Stages 1 and 2: a parameter group is concatenated and divided into equal shares; the last is padded."""

    def __init__(self, members: Sequence[nn.Parameter], share: int, group: dist.ProcessGroup):
        self.shapes, self.share, self.group = [p.shape for p in members], share, group

    def whole(self, part: Tensor) -> list[Tensor]:
        flat = gathered(part, self.group).flatten()
        pieces = flat[: sum(shape.numel() for shape in self.shapes)].split([shape.numel() for shape in self.shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]

    def part(self, whole: Sequence[Tensor]) -> Tensor:
        flat = torch.cat([tensor.flatten() for tensor in whole])
        begin = self.share * dist.get_rank(self.group)
        mine = flat[begin : begin + self.share]
        return torch.cat([mine, mine.new_zeros(self.share - len(mine))])


class PerParameterSharding(MatrixSharding):
    """Stage 3: every parameter is divided into equal, padded shares; a process's shares are concatenated."""

    def __init__(self, members: Sequence[nn.Parameter], group: dist.ProcessGroup):
        self.shapes, self.group = [p.ds_shape for p in members], group  # type: ignore[attr-defined]  # ZeRO's
        self.shares = [p.ds_tensor.numel() for p in members]  # type: ignore[attr-defined]  # ZeRO's

    def whole(self, part: Tensor) -> list[Tensor]:
        pieces = gathered(part, self.group).split(self.shares, dim=1)  # (processes, share) each
        return [
            piece.reshape(-1)[: shape.numel()].view(shape) for piece, shape in zip(pieces, self.shapes, strict=True)
        ]

    def part(self, whole: Sequence[Tensor]) -> Tensor:
        rank, parts = dist.get_rank(self.group), []
        for tensor, share in zip(whole, self.shares, strict=True):
            mine = tensor.flatten()[share * rank : share * (rank + 1)]
            parts += [mine, mine.new_zeros(share - len(mine))]
        return torch.cat(parts)


def gathered(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the equal parts of all processes, (processes, elements). Collective."""
    parts = part.new_empty(dist.get_world_size(group) * part.numel())
    dist.all_gather_into_tensor(parts, part.contiguous(), group=group)
    return parts.view(-1, part.numel())


def shardings_of(stage: int, wrapper: Any) -> dict[Tensor, MatrixSharding]:
    """Return the sharding of each flat tensor that the optimizer of DeepSpeed's `wrapper` updates."""
    if stage == 3:
        return {
            flat: PerParameterSharding(members, wrapper._get_sub_group_process_group(i))
            for i, (flat, members) in enumerate(
                zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)
            )
        }
    # zero_optimization.round_robin_gradients would change their order; ds_config.json does not have it
    return {
        flat: FlatSharding(members, flat.numel(), wrapper.real_dp_process_group[i])
        for i, (flat, members) in enumerate(
            zip(wrapper.single_partition_of_fp32_groups, wrapper.round_robin_bit16_groups, strict=True)
        )
    }
