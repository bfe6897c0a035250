"""Verifying that a converted checkpoint is what its source should have become.

An independent way: the whole-tensor definition of `octavo.schemes`, not the stream, is applied to the source, and
compared with what is on disk, bit by bit (see `compare`).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.digests import Digest, Recorded
from ..checkpoint.header import TensorInfo
from ..elements.pieces import Piece, whole
from ..errors import CheckpointError, raise_problems
from ..planning.budget import check_options, default_threads
from ..planning.kinds import module_of
from ..planning.placement import Target
from ..planning.stacks import NAMINGS, Cut, find_experts
from ..streaming.files import Files
from ..streaming.meter import progress_bar
from ..streaming.ring import Ring, SingleThreadedTorch
from . import formats, packing
from .compare import Comparison, Pair, Worker, cut
from .verified import TensorResult, VerifyReport

#: what a thread reads at once for a digest
_STEP_BYTES = 1 << 20


def verify_checkpoint(
    dst: str | os.PathLike[str],
    against: str | os.PathLike[str],
    staging_bytes: int,
    threads: int | None,
    progress: bool | Callable[[int, int], None] | None,
) -> VerifyReport:
    """`octavo.verify`, where arguments and errors are documented."""
    made, source = Checkpoint.open(dst), Checkpoint.open(against).decoded()
    if made.path.resolve() == source.path.resolve():
        raise CheckpointError(f"{dst}: compared with itself; name the checkpoint that it was made from")
    layout = formats.recognize(made)
    problems = _strays(made)
    wanted = _wanted(made, source)
    pairs = _pairs(made, wanted, layout, problems)
    found = {pair.here.name for pair in pairs}
    expected = {*wanted, *(layout.scale_name(pair.here.name) for pair in pairs if pair.scheme)}
    expected |= {pair.here.name + end for pair in pairs if pair.is_packed for end in _beside(pair)}
    problems += [f"{name}: not in {against}" for name in made.tensors if name not in expected]
    problems += [f"{name}: in {against}, but not here" for name in wanted if name not in found]
    problems += _shapes(made, pairs)
    quantized = sum(pair.scheme is not None for pair in pairs)
    if quantized and made.config and "quantization_config" not in made.config:
        problems.append(
            f"config.json: no quantization_config, without which {quantized} quantized tensors are read wrong"
        )
    problems += _contradictions(made, pairs)
    raise_problems(CheckpointError, dst, problems, f"Was it made from {against}?")
    _compare(pairs, made, source, staging_bytes, threads, progress)
    return VerifyReport(tuple(_result(pair) for pair in pairs))


def verify_digests(
    dst: str | os.PathLike[str],
    staging_bytes: int,
    threads: int | None,
    progress: bool | Callable[[int, int], None] | None,
) -> VerifyReport:
    """`octavo.verify` without a source."""
    check_options(staging_bytes, threads)
    made = Checkpoint.open(dst)
    problems = _strays(made)
    raise_problems(CheckpointError, dst, problems)
    recorded = Recorded.of(made)
    count = threads or default_threads()
    step = max(1, min(_STEP_BYTES, staging_bytes // count))
    digests = {name: Digest(info.nbytes) for name, info in made.tensors.items()}
    ring: Ring[tuple[TensorInfo, int, int]] = Ring(count, f"reading {made.path}")
    infos = made.tensors.values()
    steps = ((info, at, min(step, info.nbytes - at)) for info in infos for at in range(0, info.nbytes, step))
    with contextlib.closing(Files.of(made)) as files, progress_bar(progress, "Verifying") as callback:
        on_tick = None if callback is None else lambda done: callback(done, made.nbytes)
        ring.run(steps, lambda: _Reader(files, digests, step), on_tick)
        files.check_unchanged()
    results = []
    for name, digest in digests.items():
        same = recorded.tensors[name] == digest.value
        results.append(TensorResult(name, None, 0 if same else None, None))
    return VerifyReport(tuple(results), by_digests=True)


class _Reader:
    """A thread that reads parts of tensors for their digests."""

    def __init__(self, files: Files, digests: Mapping[str, Digest], nbytes: int) -> None:
        self._files, self._digests, self._view = files, digests, memoryview(bytearray(nbytes))

    def handle(self, part: tuple[TensorInfo, int, int]) -> int:
        info, start, nbytes = part
        self._files.read_into(info.shard, self._view[:nbytes], info.offset + start)
        self._digests[info.name].add(start, self._view[:nbytes])
        return nbytes

    def close(self) -> None:
        pass


def _strays(made: Checkpoint) -> list[str]:
    """Weights in the folder that belong to no shard of the checkpoint: some readers would take them."""
    known = {shard.path.name for shard in made.shards}
    files = sorted(made.path.glob("*.safetensors")) if made.path.is_dir() else []
    # a shard without tensors is in no index, and does no harm
    strays = [file for file in files if file.name not in known and Checkpoint.open_files([file]).tensors]
    return [f"{file.name}: belongs to no shard of this checkpoint" for file in strays]


def _contradictions(made: Checkpoint, pairs: Iterable[Pair]) -> list[str]:
    """Where config.json says otherwise of quantized weights than their headers, all whose bytes may be right."""
    quantized = {module_of(pair.here.name) for pair in pairs if pair.scheme}

    def matters(tensor: str | None) -> bool:
        return tensor is None or tensor.rpartition(".")[0] in quantized

    return [said for said in made.contradictions if quantized and matters(said.tensor)]


def _wanted(made: Checkpoint, source: Checkpoint) -> dict[str, tuple[TensorInfo, Piece | None]]:
    """Name of a tensor to be made -> the one that it is made of, and which part of a stack; in the source's order."""
    cuts: dict[str, Sequence[Target]] = {}
    for experts in find_experts(source):
        found = [(_matches(cut, made), number, cut) for number, cut in enumerate(map(experts.cut, NAMINGS))]
        most, _, best = max(found, key=lambda match: (match[0], -match[1]))
        cuts.update(best if most else {})
    wanted: dict[str, tuple[TensorInfo, Piece | None]] = {}
    for name, there in source.tensors.items():
        if name in cuts:
            wanted.update({matrix.name: (there, matrix.pieces[0]) for matrix in cuts[name]})
        else:
            wanted[name] = (there, None)
    return wanted


def _matches(cut: Cut, made: Checkpoint) -> int:
    """How many matrices are in the place of the stacks."""
    if not made.tensors.keys().isdisjoint(cut):
        return 0
    names = (matrix.name for matrices in cut.values() for matrix in matrices)
    return sum(name in made.tensors or name + packing.PACKED in made.tensors for name in names)


def _pairs(
    made: Checkpoint,
    wanted: Mapping[str, tuple[TensorInfo, Piece | None]],
    layout: formats.Format,
    problems: list[str],
) -> list[Pair]:
    """The tensors that both have; what keeps one from being compared is a problem."""
    pairs = []
    for name, (there, matrix) in wanted.items():
        packed = packing.unpacked(made.tensors.get(name + packing.PACKED), name)
        here = made.tensors.get(name, packed)
        if here is None:
            continue
        pair = Pair(here, there, matrix, here is packed)
        pairs.append(pair)
        if here.shape != pair.shape:
            problems.append(f"{name}: {list(here.shape)} here, {list(pair.shape)} there")
            continue
        if here.dtype_name == there.dtype_name:
            if matrix is not None:
                problems.append(f"{name}: unquantized, which octavo does not cut out of {there.name}")
            continue
        scale = made.tensors.get(layout.scale_name(name))
        if len(pair.shape) < 2 or not there.quantizable:
            problems.append(f"{name}: {here.dtype_name} here, {there.dtype_name} there, which octavo does not quantize")
        elif scale is None:
            problems.append(f"{name} is {here.dtype_name}, but has no scale beside it")
        else:
            try:
                stored = torch.empty(scale.shape, dtype=scale.dtype, device="meta")
                pair.scheme = layout.scheme_of(here.shape, here.dtype, stored)
            except CheckpointError as error:
                problems.append(f"{name}: {error}")
                continue
            if pair.scheme.packed:
                pair.whole_scale = made.tensors.get(name + packing.GLOBAL)
                if pair.whole_scale is None or (pair.whole_scale.dtype_name, pair.whole_scale.shape) != ("F32", (1,)):
                    problems.append(f"{name}{packing.GLOBAL}: missing, or not one float32, which readers want")
                    pair.scheme = None
                    continue
                pair.scale = scale
            elif here.dtype == pair.scheme.dtype and scale.dtype == layout.stored_dtype(pair.scheme, pair.passing):
                pair.scale = scale
            else:
                pair.differing_bytes = here.nbytes + scale.nbytes
    return pairs


def _beside(pair: Pair) -> tuple[str, ...]:
    """How the names of a packed weight and of what stands beside it end."""
    return (packing.PACKED, packing.GLOBAL if pair.here.dtype == torch.uint8 else packing.SHAPE)


def _shapes(made: Checkpoint, pairs: list[Pair]) -> list[str]:
    """What is wrong with the shapes that stand beside packed weights."""
    problems = []
    with contextlib.closing(Files.of(made)) as files:
        for pair in pairs:
            name = pair.here.name + packing.SHAPE
            if not pair.is_packed or packing.SHAPE not in _beside(pair):
                continue
            info, wanted = made.tensors.get(name), packing.shape_tensor(pair.shape)
            if info is None or (info.dtype_name, info.shape) != ("I64", tuple(wanted.shape)):
                problems.append(f"{name}: missing, or not two int64 numbers, which readers want beside packed weights")
            elif (found := files.read_values(info, whole(name, info.shape)).tolist()) != wanted.tolist():
                problems.append(f"{name}: holds {found}, and the weight is {wanted.tolist()}")
    return problems


def _compare(
    pairs: list[Pair],
    made: Checkpoint,
    source: Checkpoint,
    staging_bytes: int,
    threads: int | None,
    progress: bool | Callable[[int, int], None] | None,
) -> None:
    single = SingleThreadedTorch()
    single.hold()
    try:
        with contextlib.ExitStack() as stack:
            files = [Files.of(checkpoint) for checkpoint in (made, source)]
            for opened in files:
                stack.callback(opened.close)
            job = Comparison(files[0], files[1], staging_bytes, threads)
            job.ring.workers.what = f"reading {made.path} and {source.path}"
            stack.callback(job.ring.finish)  # before the files are closed, should Ctrl-C come just before `run` did it
            callback = stack.enter_context(progress_bar(progress, "Verifying"))
            on_tick = None if callback is None else lambda done: callback(done, source.nbytes)
            job.ring.run(cut(pairs, job.limit), lambda: Worker(job), on_tick)
            for opened in files:
                opened.check_unchanged()
    finally:
        single.release()


def _result(pair: Pair) -> TensorResult:
    scheme = pair.scheme.name if pair.scheme else None
    db = _ratio_db(pair.signal, pair.noise) if pair.scheme and pair.scale else None
    return TensorResult(pair.here.name, scheme, pair.differing_bytes, db, pair.passed)


def _ratio_db(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf  # -inf also for a damaged scale: noise without bounds


__all__ = ["TensorResult", "VerifyReport", "verify_checkpoint", "verify_digests"]
