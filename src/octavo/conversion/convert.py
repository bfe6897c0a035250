"""A checkpoint into an FP8 checkpoint: one shard out for each shard in, streamed, resumable, all or nothing.

Everything is written into ``DST.partial``: the shards (header first, since all shapes are known; then chunks as they
come), a manifest of those that are finished, and last the config, tokenizer files and index. Then it is renamed to
``DST``. A run that is killed leaves no folder that looks converted; the same command goes on where it was, and notices
if the source or the options changed in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import INDEX_NAME, SHARD_NAME, SINGLE_NAME, Checkpoint
from ..checkpoint.files import local_path
from ..errors import OutputError, SourceChangedError
from ..machine import usable_device
from ..planning.budget import Budget
from ..planning.placement import Placement
from ..planning.plan import Plan
from ..planning.recipe import Recipe
from ..streaming.meter import Stages, measured
from ..streaming.outfile import OutFile, disk_error
from ..streaming.report import Report
from ..streaming.sinks import ShardSink
from ..streaming.stream import Stream, Tally
from ..text import human_bytes
from . import formats
from .finisher import Finisher
from .layout import ShardLayout, check_names, share_of
from .partial import Folder, PartialFolder, check_free

#: raised whenever the bytes of an output could differ from those of an earlier version
_BYTES_VERSION = 1
#: weights in other forms, which can be as large as the model; and the index, which is written anew
_NOT_COPIED = (
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack"),
    *(".onnx", ".onnx_data", ".ot", ".npz", ".tflite"),
)


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    recipe: Recipe,
    format: str,
    staging_bytes: int,
    threads: int | None,
    device: str | torch.device,
    revision: str | None,
    progress: bool | Callable[[int, int], None] | None,
) -> Report:
    """`octavo.convert`, where arguments and errors are documented."""
    stages = Stages()
    where = str(usable_device(device))
    with stages("open"):
        checkpoint = Checkpoint.open(src, revision)
    with stages("plan"):
        plan, layout = formats.plan_for(checkpoint, recipe, format, staging_bytes, where)
        job = Job.prepare(checkpoint, plan, layout, local_path(dst, OutputError))
    tally = Tally()
    with job.partial_folder() as partial, measured(plan, progress, "Converting") as meter:
        with stages("stream"):
            budget = Budget.fit(plan.placements, plan.staging_bytes, threads, handing_out=True)
            meter.follow(tally)
            job.write_shards(partial, budget, tally, meter.progress)
        with stages("finish"):
            job.write_rest(partial)
            job.publish(partial)
    notes = [*plan.notes, *layout.notes(plan), *job.notes()]
    return Report.of(plan, budget, tally, stages, meter, in_memory=False, notes=notes)


def _check_apart(source: Iterable[Path], dst: Path) -> None:
    """Raise if the source lies where octavo writes, by whatever names and links either is reached."""
    partial = _partial_of(dst)
    real = [path.resolve() for path in source]
    places = {place for path in real for place in (path, *path.parents) if place.is_dir()}
    if os.path.isdir(partial) and any(os.path.samefile(place, partial) for place in places):
        raise OutputError(f"{partial}: holds the source, and {dst.name} would be written there. Name another target.")


@dataclass(frozen=True)
class Job:
    """One conversion: what is to be written where, and what has been."""

    checkpoint: Checkpoint
    plan: Plan
    layout: formats.Format
    dst: Path
    shards: tuple[tuple[ShardLayout, Plan], ...]
    small_files: tuple[Path, ...]

    @classmethod
    def prepare(cls, checkpoint: Checkpoint, plan: Plan, layout: formats.Format, dst: Path) -> Job:
        dst = dst.absolute()
        check_free(dst)
        if not dst.parent.is_dir():
            raise OutputError(f"{dst.parent}: no such folder to put {dst.name} into")
        lone = SHARD_NAME.match(checkpoint.path.name)
        if checkpoint.path.is_file() and lone and int(lone["count"]) > 1:
            raise OutputError(
                f"{checkpoint.path}: one shard of {int(lone['count'])}, of which a converted folder would look whole. "
                f"Give the folder {checkpoint.path.parent}."
            )
        by_shard: dict[int, list[Placement]] = {number: [] for number in range(len(checkpoint.shards))}
        for placement in plan.placements:
            by_shard[checkpoint.tensors[placement.pieces[0].src_name].shard].append(placement)
        shards = []
        for number, placements in by_shard.items():
            name = checkpoint.shards[number].path.name if len(by_shard) > 1 else SINGLE_NAME
            layout_of = ShardLayout.of(name, placements, layout, checkpoint)
            shards.append((layout_of, replace(plan, placements=tuple(placements))))
        check_names(plan, layout, dst)
        small_files = _small_files(checkpoint)
        _check_apart([checkpoint.path, *(shard.path for shard in checkpoint.shards), *small_files], dst)
        return cls(checkpoint, plan, layout, dst, tuple(shards), small_files)

    # -- the partial folder -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def partial_folder(self) -> Iterator[PartialFolder]:
        """The partial folder, made or taken up again, and locked against other processes."""
        with PartialFolder.locked(_partial_of(self.dst)) as partial:
            if partial.finished:
                self._check_resumable(partial)
            try:
                partial.take_up(self._identity(), [shard.name for shard, _ in self.shards], self._other_files())
            except OSError as error:
                raise disk_error(partial.path, error) from error
            self._check_room(partial)
            yield partial

    def _other_files(self) -> list[str]:
        """Names of the files that `write_rest` writes."""
        written = ["config.json"] if self.checkpoint.config else []
        return [file.name for file in self.small_files] + written + ([INDEX_NAME] if len(self.shards) > 1 else [])

    def _identity(self) -> dict[str, Any]:
        """A description of all that must not change between an interrupted run and its continuation."""
        headers = hashlib.sha256()
        for shard_layout, _ in self.shards:
            headers.update(shard_layout.header)
        return {
            "bytes_version": _BYTES_VERSION,
            "recipe": self.plan.recipe.to_dict(),
            "format": self.layout.name,
            "layout": headers.hexdigest(),
            "source": {
                "path": str(self.checkpoint.path.absolute()),
                "shards": {shard.path.name: [shard.nbytes, shard.mtime_ns] for shard in self.checkpoint.shards},
            },
        }

    def _check_resumable(self, partial: PartialFolder) -> None:
        manifest, wanted = partial.manifest, self._identity()
        if manifest.get("source") != wanted["source"]:
            raise SourceChangedError(
                f"{self.checkpoint.path}: changed since the interrupted run that {partial.path} holds. Remove that "
                "folder to begin anew."
            )
        different = [key for key in wanted if manifest.get(key) != wanted[key]]
        if different:
            raise OutputError(
                f"{partial.path}: holds an interrupted conversion with another {', '.join(different)}. Give the same "
                "options to go on with it, or remove the folder to begin anew."
            )

    def _check_room(self, partial: PartialFolder) -> None:
        needed = sum(shard.nbytes for shard, _ in self.shards if shard.name not in partial.finished)
        free = shutil.disk_usage(partial.descriptor).free
        if needed > free:
            raise OutputError(
                f"{self.dst.parent}: {human_bytes(needed)} are still to be written, {human_bytes(free)} are free. "
                "Make room and run the same command again."
            )

    # -- writing ------------------------------------------------------------------------------------------------------

    def write_shards(
        self,
        partial: PartialFolder,
        budget: Budget,
        tally: Tally,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Write all shards that are not finished."""
        total = sum(plan.source_bytes for _, plan in self.shards)
        before = 0
        with Finisher.of(partial) as finisher:
            for shard, plan in self.shards:
                if shard.name not in partial.finished:
                    shown = share_of(progress, before, plan.source_bytes, total)
                    file = self._write_shard(finisher, shard, plan, budget, tally, shown)
                    finisher.submit(file, shard)
                before += plan.source_bytes

    def _write_shard(
        self,
        finisher: Finisher,
        shard: ShardLayout,
        plan: Plan,
        budget: Budget,
        tally: Tally,
        progress: Callable[[int, int], None] | None,
    ) -> OutFile:
        file = finisher.open(shard)
        file.write(memoryview(shard.header), 0)
        sink = ShardSink(file, shard.weights, shard.scales, self.layout.stored_scale)
        finisher.fill(Stream(self.checkpoint, plan, sink, budget=budget, tally=tally), file).run(progress)
        return file

    def write_rest(self, partial: PartialFolder) -> None:
        """Config, tokenizer files, index."""
        result = partial.result
        try:
            for file in self.small_files:
                _copy(file, result)
            config = dict(self.checkpoint.config)
            if config:
                if self.plan.quantized:
                    config["quantization_config"] = self.layout.config(self.plan)
                result.write("config.json", json.dumps(config, indent=2) + "\n")
            if len(self.shards) > 1:
                result.write(INDEX_NAME, self._index())
        except OSError as error:
            raise disk_error(result.path, error) from error

    def publish(self, partial: PartialFolder) -> None:
        """Make the complete folder appear under its name."""
        try:
            partial.publish(self.dst)
        except OSError as error:
            raise disk_error(self.dst, error) from error

    def notes(self) -> list[str]:
        """Remarks about files of the source's folder that are not in the result."""
        folders = [entry.name for entry in sorted(self.checkpoint.folder.iterdir()) if entry.is_dir()]
        visible = [name for name in folders if not name.startswith(".")]
        return [f"subfolders are not copied: {', '.join(visible)}"] if visible and self.checkpoint.path.is_dir() else []

    def _index(self) -> str:
        total = sum(p.nbytes for p in self.plan.placements)
        total += sum(self.layout.scale_bytes(p) for p in self.plan.quantized)
        weight_map = {name: shard.name for shard, _ in self.shards for name in shard.tensor_names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return json.dumps(index, indent=2) + "\n"


def _partial_of(dst: Path) -> Path:
    return dst.with_name(dst.name + ".partial")


def _small_files(checkpoint: Checkpoint) -> tuple[Path, ...]:
    """The files that are copied as they are: of the tokenizer, and the like."""
    if not checkpoint.path.is_dir() and not checkpoint.config:
        return ()  # a lone file: what lies beside it is not ours
    written = {"config.json"} if checkpoint.config else set()
    return tuple(
        entry
        for entry in sorted(checkpoint.folder.iterdir())
        if entry.is_file()
        and entry.name not in written
        and not entry.name.startswith(".")
        and not entry.name.endswith(_NOT_COPIED)
    )


def _copy(file: Path, folder: Folder) -> None:
    try:
        source = file.open("rb")
    except OSError as error:
        raise SourceChangedError(f"{file}: can't be read any more: {error.strerror}") from error
    with source, folder.new_file(file.name) as copy:
        shutil.copyfileobj(source, copy)
