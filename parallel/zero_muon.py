"""How the flat tensors that ZeRO's optimisers update hold matrices, for Muon, which must see them whole.

A step then gathers what Muon would move each matrix by, as it stands in all processes: as many numbers as the hidden
matrices have, once a step. Every process orthogonalizes them all, and keeps its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.muon import MatrixSharding


class FlatSharding(MatrixSharding):
    """Stages 1 and 2: a parameter group laid end to end, and cut into equal shares, the last filled up with zeros."""

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
    """Stage 3: every parameter cut into equal shares, the last filled up with zeros; a process's shares laid end to end."""

    def __init__(self, members: Sequence[nn.Parameter], group: dist.ProcessGroup):
        self.shapes, self.group = [p.ds_shape for p in members], group
        self.shares = [p.ds_tensor.numel() for p in members]

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
    """The equal parts of all processes, (processes, elements). Collective."""
    parts = part.new_empty(dist.get_world_size(group) * part.numel())
    dist.all_gather_into_tensor(parts, part.contiguous(), group=group)
    return parts.view(-1, part.numel())


def shardings_of(stage: int, wrapper: Any) -> dict[Tensor, MatrixSharding]:
    """The cut of each flat tensor that DeepSpeed's `wrapper` has its optimiser update."""
    if stage == 3:
        return {
            flat: PerParameterSharding(members, wrapper._get_sub_group_process_group(i))
            for i, (flat, members) in enumerate(
                zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)
            )
        }
    # zero_optimization.round_robin_gradients would order them otherwise; ds_config.json does not have it
    return {
        flat: FlatSharding(members, flat.numel(), wrapper.real_dp_process_group[i])
        for i, (flat, members) in enumerate(
            zip(wrapper.single_partition_of_fp32_groups, wrapper.round_robin_bit16_groups, strict=True)
        )
    }
