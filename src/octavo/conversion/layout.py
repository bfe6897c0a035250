"""The layout of a converted checkpoint: its shards, headers and offsets, known before a byte is written."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import dtypes
from ..checkpoint.checkpoint import Checkpoint
from ..errors import OutputError, raise_problems
from ..planning.placement import Placement
from ..planning.plan import Plan
from . import formats


@dataclass(frozen=True)
class ShardLayout:
    """One output file: its header, and where each tensor's bytes begin."""

    name: str
    header: bytes
    nbytes: int
    weights: Mapping[str, int]  # placement -> absolute offset
    scales: Mapping[str, int]
    groups: Mapping[str, int]  # scales that belong to the numbers of a weight
    constants: tuple[tuple[int, bytes], ...]  # absolute offset, and what is there whatever the weights are
    tensor_names: tuple[str, ...]

    @classmethod
    def of(
        cls, name: str, placements: Iterable[Placement], layout: formats.Format, checkpoint: Checkpoint
    ) -> ShardLayout:
        """Lay tensors out with the widest dtypes first, so that each is aligned to its own element."""
        entries: list[tuple[int, str, str, tuple[int, ...], str, str]] = []
        constants: dict[str, bytes] = {}
        for p in placements:
            # planned as bytes where torch lacks the dtype; the header has its own shape
            dtype_name, shape = layout.weight_type(p) if p.scheme else (p.dtype_name, checkpoint.tensors[p.name].shape)
            entries.append((dtypes.BITS[dtype_name], layout.weight_name(p), dtype_name, shape, "weight", p.name))
            if p.scheme:
                for key, (what, dtype_name, shape) in layout.scales(p).items():
                    entries.append((dtypes.BITS[dtype_name], key, dtype_name, shape, what, p.name))
            for key, tensor in layout.beside(p).items():
                dtype_name, constants[key] = dtypes.NAMES[tensor.dtype], tensor.numpy().tobytes()
                entries.append((dtypes.BITS[dtype_name], key, dtype_name, tuple(tensor.shape), "constant", key))
        entries.sort(key=lambda entry: -entry[0])  # stable: reading order within a width
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets: dict[str, dict[str, int]] = {"weight": {}, "scale": {}, "group": {}, "constant": {}}
        end = 0
        for bits, tensor_name, dtype_name, shape, what, key in entries:
            begin, count = end, bits
            for n in shape:
                count *= n
            end += count // 8
            header[tensor_name] = {"dtype": dtype_name, "shape": list(shape), "data_offsets": [begin, end]}
            offsets[what][key] = begin
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        base = 8 + len(text)
        return cls(
            name,
            struct.pack("<Q", len(text)) + text,
            base + end,
            {key: base + value for key, value in offsets["weight"].items()},
            {key: base + value for key, value in offsets["scale"].items()},
            {key: base + value for key, value in offsets["group"].items()},
            tuple((base + value, constants[key]) for key, value in offsets["constant"].items()),
            tuple(key for key in header if key != "__metadata__"),
        )


def check_names(plan: Plan, layout: formats.Format, dst: Path) -> None:
    taken = {placement.name for placement in plan.placements}
    problems = [
        f"{name} is a tensor of the source, and would be the scale of {p.name}"
        for p in plan.quantized
        for name in layout.scales(p)
        if name in taken
    ]
    problems += [
        f"{name} is a tensor of the source, and would be that of {p.name}"
        for p in plan.quantized
        for name in ({layout.weight_name(p)} - {p.name}) | layout.beside(p).keys()
        if name in taken
    ]
    raise_problems(OutputError, dst, problems, "Is the source quantized already?")


def share_of(
    progress: Callable[[int, int], None] | None, before: int, share: int, total: int
) -> Callable[[int, int], None] | None:
    """Progress of one shard as progress of the whole."""
    if progress is None:
        return None
    return lambda done, of: progress(before + (done * share // of if of else share), total)
