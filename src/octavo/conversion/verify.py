"""Verifying that a converted checkpoint is what its source should have become.

An independent way: the whole-tensor definition of `octavo.schemes`, not the stream, is applied to the source, and
compared with what is on disk, bit by bit. Memory is bounded by `_BLOCK_ELEMENTS` of the widest scheme group.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.header import TensorInfo
from ..errors import CheckpointError, raise_problems
from ..numerics import schemes
from ..numerics.schemes import Scheme
from ..streaming.meter import progress_bar
from . import formats

_BLOCK_ELEMENTS = 1 << 25


@dataclass(frozen=True, slots=True)
class TensorResult:
    """One tensor of the converted checkpoint against its source."""

    name: str
    scheme: str | None  # None: kept
    differing_bytes: int  # of weight and scale
    error_db: float | None  # signal-to-noise against the source; None where nothing was quantized

    @property
    def equal(self) -> bool:
        return self.differing_bytes == 0


@dataclass(frozen=True)
class VerifyReport:
    """All tensors. ``ok`` when every byte is what quantizing the source gives."""

    tensors: tuple[TensorResult, ...]

    @property
    def ok(self) -> bool:
        return all(result.equal for result in self.tensors)

    @property
    def different(self) -> list[TensorResult]:
        return [result for result in self.tensors if not result.equal]

    def to_dict(self) -> dict[str, Any]:
        """A form that JSON can hold."""
        return {
            "ok": self.ok,
            "tensors": [
                {
                    "name": r.name,
                    "scheme": r.scheme,
                    "equal": r.equal,
                    "differing_bytes": r.differing_bytes,
                    "error_db": r.error_db if r.error_db is None or math.isfinite(r.error_db) else None,
                }
                for r in self.tensors
            ],
        }


def verify_checkpoint(
    dst: str | os.PathLike[str],
    against: str | os.PathLike[str],
    progress: bool | Callable[[int, int], None] | None,
) -> VerifyReport:
    """`octavo.verify`, where arguments and errors are documented."""
    made, source = Checkpoint.open(dst), Checkpoint.open(against)
    if made.path.resolve() == source.path.resolve():
        raise CheckpointError(f"{dst}: compared with itself; name the checkpoint that it was made from")
    layout = formats.recognize(made)
    expected = {*source.tensors}
    expected |= {layout.scale_name(name) for name in source.tensors if _is_quantized(name, made, source)}
    problems = [f"{name}: not in {against}" for name in made.tensors if name not in expected]
    problems += [f"{name}: in {against}, but not here" for name in source.tensors if name not in made.tensors]
    quantized = sum(_is_quantized(name, made, source) for name in source.tensors)
    if quantized and made.config and "quantization_config" not in made.config:
        problems.append(f"config.json: no quantization_config, without which {quantized} FP8 tensors are read wrong")
    for name in made.tensors.keys() & source.tensors.keys():
        if made.tensors[name].shape != source.tensors[name].shape:
            problems.append(f"{name}: {list(made.tensors[name].shape)} here, {list(source.tensors[name].shape)} there")
    raise_problems(CheckpointError, dst, problems, f"Was it made from {against}?")
    results, done = [], 0
    with progress_bar(progress, "Verifying") as callback:
        for name, info in source.tensors.items():
            results.append(_compare(name, made, source, layout))
            done += info.nbytes
            if callback:
                callback(done, source.nbytes)
    return VerifyReport(tuple(results))


def _is_quantized(name: str, made: Checkpoint, source: Checkpoint) -> bool:
    return name in made.tensors and made.tensors[name].dtype_name != source.tensors[name].dtype_name


def _compare(name: str, made: Checkpoint, source: Checkpoint, layout: formats.Format) -> TensorResult:
    here, there = made.tensors[name], source.tensors[name]
    if here.dtype_name == there.dtype_name:
        return TensorResult(name, None, _differing_file_bytes(made, here, source, there), None)
    if layout.scale_name(name) not in made.tensors:
        raise CheckpointError(f"{made.path}: {name} is {here.dtype_name}, but has no scale beside it")
    scale = _read(made, made.tensors[layout.scale_name(name)])
    scheme = layout.scheme_of(here.shape, scale)
    differing, signal, noise = 0, 0.0, 0.0
    with safe_open(_file(made, here), "pt") as mine, safe_open(_file(source, there), "pt") as theirs:
        q_slice, w_slice = mine.get_slice(name), theirs.get_slice(name)
        stored = layout.loaded_scale(scale, here.shape, scheme)
        for index in _matrices(here.shape):
            part = stored[index] if index else stored
            d, s, n = _compare_matrix(q_slice, w_slice, index, here.shape[-2:], part, scheme)
            differing, signal, noise = differing + d, signal + s, noise + n
    db = _ratio_db(signal, noise)
    return TensorResult(name, scheme.name, differing, db)


def _ratio_db(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf  # -inf also for a damaged scale: noise without bounds


def _compare_matrix(
    q_slice: Any, w_slice: Any, index: tuple[int, ...], shape: tuple[int, ...], scale: Tensor, scheme: Scheme
) -> tuple[int, float, float]:
    """Differing bytes, |w|², |w - q·scale|² of one matrix."""
    rows, cols = shape
    step = max(1, _BLOCK_ELEMENTS // max(cols, 1) // 128) * 128
    blocks = [(start, min(rows, start + step)) for start in range(0, rows, step)]
    grid = scale.reshape(scheme.cells(rows, cols))
    whole = None
    if scheme.group_rows is None:
        amax = [schemes.group_amax(w_slice[(*index, slice(a, b))], scheme) for a, b in blocks]
        whole = schemes.scale_from_amax(torch.stack(amax).amax(0), scheme)
    differing, signal, noise = 0, 0.0, 0.0
    for a, b in blocks:
        w, q = w_slice[(*index, slice(a, b))], q_slice[(*index, slice(a, b))]
        cells = whole if whole is not None else schemes.scale_from_amax(schemes.group_amax(w, scheme), scheme)
        first = 0 if scheme.group_rows is None else a // scheme.group_rows
        found = grid[first : first + cells.shape[0]]
        differing += _differing_bytes(schemes.to_stored(cells, scheme), found) if a == 0 or whole is None else 0
        expected = torch.empty(w.shape, dtype=schemes.FP8)
        schemes.quantize_into(expected, w, cells, scheme)
        differing += _differing_bytes(expected, q)
        error = w.float() - schemes.dequantize(q, found, scheme)
        signal += float(w.float().square().sum(dtype=torch.float64))
        noise += float(error.square().sum(dtype=torch.float64))
    return differing, signal, noise


def _matrices(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if len(shape) == 2:
        yield ()
        return
    for index in range(shape[0]):
        for rest in _matrices(shape[1:]):
            yield (index, *rest)


def _differing_bytes(a: Tensor, b: Tensor) -> int:
    if a.dtype != b.dtype or a.shape != b.shape:
        return max(a.nbytes, b.nbytes)
    if not a.numel():
        return 0
    flat_a, flat_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return int((flat_a != flat_b).sum())


def _differing_file_bytes(made: Checkpoint, here: TensorInfo, source: Checkpoint, there: TensorInfo) -> int:
    """Bytes as they are in the files: for dtypes that torch lacks, too."""
    differing = 0
    with open(_file(made, here), "rb") as mine, open(_file(source, there), "rb") as theirs:
        mine.seek(here.offset)
        theirs.seek(there.offset)
        for start in range(0, there.nbytes, _BLOCK_ELEMENTS):
            count = min(_BLOCK_ELEMENTS, there.nbytes - start)
            a, b = (np.frombuffer(file.read(count), np.uint8) for file in (mine, theirs))
            differing += int((a != b).sum()) if len(a) == len(b) else count
    return differing


def _file(checkpoint: Checkpoint, info: TensorInfo) -> Path:
    return checkpoint.shards[info.shard].path


def _read(checkpoint: Checkpoint, info: TensorInfo) -> Tensor:
    with safe_open(_file(checkpoint, info), "pt") as file:
        tensor: Tensor = file.get_tensor(info.name)
    return tensor


__all__ = ["TensorResult", "VerifyReport", "verify_checkpoint"]
