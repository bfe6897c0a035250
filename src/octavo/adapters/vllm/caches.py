"""Scales of a quantized KV cache that come with weights which are quantized already.

They belong to no weight, so that what a checkpoint stands for has none of them. vLLM's loader knows by which names they
come, and takes them where it is given them; where its cache is in the model's dtype, it has no use for them.
"""

from __future__ import annotations

from dataclasses import replace

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.codings import OF_CACHE


def with_scales_of_caches(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the scales of caches that decoding left out, as they are."""
    scales = scales_of_caches(checkpoint)
    if not scales or checkpoint.source is None:
        return checkpoint
    found = {**checkpoint.tensors, **{name: checkpoint.source.tensors[name] for name in scales}}
    in_order = sorted(found.values(), key=lambda info: (info.shard, info.offset))
    left_out = {name: what for name, what in checkpoint.left_out.items() if name not in scales}
    return replace(checkpoint, tensors={info.name: info for info in in_order}, left_out=left_out)


def scales_of_caches(checkpoint: Checkpoint) -> list[str]:
    """Those that decoding left out."""
    return [name for name, what in checkpoint.left_out.items() if what == OF_CACHE]


def unused_scales(checkpoint: Checkpoint) -> str | None:
    """A remark on scales that are not read."""
    scales = scales_of_caches(checkpoint)
    if not scales:
        return None
    return (
        f"the checkpoint has scales of a KV cache in FP8 ({len(scales):,} tensors; {scales[0]}, ...), which are not "
        "read, since the cache is in the dtype of the model; --kv-cache-dtype fp8 takes them"
    )
