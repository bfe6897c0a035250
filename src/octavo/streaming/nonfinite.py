"""Which weight was not finite, said in words."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..elements.pieces import Piece, contiguous_strides
from ..planning.placement import Placement


def nonfinite_text(checkpoint: Checkpoint, piece: Piece, values: Tensor, placement: Placement) -> str:
    """The first non-finite number among the values of a piece, its place in the checkpoint, and what to do about it."""
    position = torch.nonzero(~torch.isfinite(values))[0].tolist()
    info = checkpoint.tensors[piece.src_name]
    flat = piece.src_off + sum(at * stride for at, stride in zip(position, piece.src_strides, strict=True))
    where = [flat // stride % n for n, stride in zip(info.shape, contiguous_strides(info.shape), strict=True)]
    of = "" if placement.name == info.name else f", part of {placement.name}"
    return (
        f"{checkpoint.shard_of(info.name).path.name}: tensor {info.name!r} holds {values[tuple(position)].item()} "
        f"(at {where}){of}: a non-finite weight has no FP8 form. Repair the checkpoint, or keep it with "
        f"ignore={list(placement.ignored_as or (placement.name,))}."
    )


def describe_nonfinite(checkpoint: Checkpoint, pieces: Iterable[tuple[Placement, Piece]]) -> str:
    """`nonfinite_text` for pieces of which only the amax has been seen: reads them again."""
    for placement, piece in pieces:
        with safe_open(checkpoint.shard_of(piece.src_name).path, "pt") as file:
            source = file.get_tensor(piece.src_name)
        values = source.reshape(-1).as_strided(piece.size, piece.src_strides, piece.src_off)
        if not bool(torch.isfinite(values).all()):
            return nonfinite_text(checkpoint, piece, values, placement)
    raise AssertionError("an amax is not finite, but the weights are")
