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
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.checkpoint import Checkpoint, read_config
from ..checkpoint.digests import NAME as DIGESTS_NAME
from ..checkpoint.digests import ShardDigests
from ..checkpoint.digests import to_text as digests_text
from ..checkpoint.files import local_path
from ..checkpoint.folders import INDEX_NAME, SHARD_NAME, SINGLE_NAME, WEIGHTS_KEY
from ..errors import OutputError, SourceChangedError
from ..machine import usable_device
from ..planning.budget import Budget
from ..planning.placement import Placement
from ..planning.plan import Plan, Veto
from ..planning.recipe import Recipe
from ..planning.stacks import Cut
from ..streaming.checks import Checks
from ..streaming.meter import Stages, measured, said_meanwhile
from ..streaming.outfile import OutFile, disk_error
from ..streaming.report import Report
from ..streaming.sinks import ShardSink
from ..streaming.stream import Stream, Tally
from ..text import human_bytes
from . import formats, source
from .finisher import Finisher
from .folder import permissions
from .global_scales import notes_on_global_scales
from .layout import ShardLayout, check_names, share_of
from .partial import PartialFolder, check_free
from .proof import Proof, Reader, prove
from .small_files import SmallFile, find_small_files

#: raised whenever the bytes of an output could differ from those of an earlier version
_BYTES_VERSION = 1


def convert_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    recipe: Recipe,
    format: str,
    staging_bytes: int,
    threads: int | None,
    device: str | torch.device,
    revision: str | None,
    digests: bool,
    verify: bool,
    progress: bool | Callable[[int, int], None] | None,
    readers: Callable[[], Sequence[Reader]] | None = None,
) -> Report:
    """`octavo.convert`, where arguments and errors are documented; ``readers`` are those that prove the result."""
    stages = Stages()
    where = str(usable_device(device))
    with stages("open"):
        checkpoint = Checkpoint.open(src, revision).decoded()
        checks = Checks(checkpoint) if verify else None
    layout = formats.get(format)

    def plan_with(veto: Veto, cuts: Sequence[Cut]) -> Plan:
        return formats.plan_for(checkpoint, recipe, format, staging_bytes, where, veto, cuts)[0]

    with said_meanwhile(progress, "Planning" + (", and asking readers what they would make of it" if readers else "")):
        proof = prove(checkpoint, plan_with, layout, readers, stages)
    plan = proof.plan
    with stages("plan"):
        job = Job.prepare(checkpoint, proof, layout, local_path(dst, OutputError), digests, checks)
        budget = Budget.fit(plan.placements, plan.staging_bytes, threads, handing_out=True)
        budget.require(plan.source)
    tally = Tally()
    copied = checkpoint.quantization is not None  # and says so itself
    notes = [*plan.notes, *proof.notes, *([] if copied else layout.notes(plan, proof.asked))]
    notes += job.notes()  # which read the source's folder: nothing fails at the end
    partial: PartialFolder | None = None
    try:
        with job.partial_folder() as partial, measured(plan, progress, "Converting") as meter:
            with stages("stream"):
                meter.follow(tally)
                job.write_shards(partial, budget, tally, meter.progress)
                notes += notes_on_global_scales(partial.result, job.shards)
            with stages("finish"):
                job.write_rest(partial)
                job.publish(partial)
        return Report.of(plan, budget, tally, stages, meter, in_memory=False, notes=[*notes, *partial.notes])
    except KeyboardInterrupt as interrupt:
        if partial is not None:
            _tell_if_complete(interrupt, partial, job.dst)
        raise


def _tell_if_complete(interrupt: KeyboardInterrupt, partial: PartialFolder, dst: Path) -> None:
    """Let an interrupt say that nothing is missing, if that is so; another one meanwhile is no more than the first."""
    for _ in range(5):
        with contextlib.suppress(KeyboardInterrupt):
            if partial.became(dst):
                interrupt.args = (f"{dst} is complete: the interrupt came after that",)
            return


def _check_apart(read: Iterable[Path], dst: Path) -> None:
    """Raise if the source lies where octavo writes, by whatever names and links either is reached."""
    partial = partial_of(dst)
    real = [path.resolve() for path in read]
    places = {place for path in real for place in (path, *path.parents) if place.is_dir()}
    if os.path.isdir(partial) and any(os.path.samefile(place, partial) for place in places):
        raise OutputError(f"{partial}: holds the source, and {dst.name} would be written there. Name another target.")


@dataclass(frozen=True)
class Job:
    """One conversion: what is to be written where, and what has been."""

    checkpoint: Checkpoint
    plan: Plan
    quantization: Mapping[str, Any] | None  # config.json's quantization_config
    layout: formats.Format
    dst: Path
    shards: tuple[tuple[ShardLayout, Plan], ...]
    small_files: tuple[SmallFile, ...]
    remarks: tuple[str, ...]
    marks: source.Marks  # of the source's shards
    digests: bool  # whether they are recorded
    checks: Checks | None  # of the source

    @classmethod
    def prepare(
        cls,
        checkpoint: Checkpoint,
        proof: Proof,
        layout: formats.Format,
        dst: Path,
        digests: bool,
        checks: Checks | None,
    ) -> Job:
        plan = proof.plan
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
        small_files, remarks = find_small_files(checkpoint)
        read = [checkpoint.path, *(shard.path for shard in checkpoint.shards), *(file.path for file in small_files)]
        _check_apart(read, dst)
        marks = source.marks_of(checkpoint)
        return cls(
            checkpoint,
            plan,
            proof.quantization,
            layout,
            dst,
            tuple(shards),
            small_files,
            tuple(remarks),
            marks,
            digests,
            checks,
        )

    # -- the partial folder -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def partial_folder(self) -> Iterator[PartialFolder]:
        """The partial folder, made or taken up again, and locked against other processes."""
        folder = self.checkpoint.path
        mode = permissions(folder) | stat.S_IRWXU if folder.is_dir() else 0o777
        with PartialFolder.locked(partial_of(self.dst), mode) as partial:
            check_free(self.dst)  # a run that held the lock may have made it meanwhile
            anew = self._check_resumable(partial) if partial.finished else set()
            try:
                names, verify = [shard.name for shard, _ in self.shards], self.checks is not None
                partial.take_up(self._identity(), names, self._other_files(), anew, digests=self.digests, verify=verify)
            except OSError as error:
                raise disk_error(partial.path, error) from error
            self._check_room(partial)
            yield partial

    def _other_files(self) -> list[str]:
        """Names of the files that `write_rest` writes."""
        written = ["config.json"] if self.checkpoint.stored_config else []
        written += [INDEX_NAME] if len(self.shards) > 1 else []
        written += [DIGESTS_NAME] if self.digests else []
        return [file.name for file in self.small_files] + written

    def _identity(self) -> dict[str, Any]:
        """A description of all that must not change between an interrupted run and its continuation."""
        headers = hashlib.sha256()
        for shard_layout, _ in self.shards:
            headers.update(shard_layout.header)
        for placement in self.plan.placements:  # the same numbers, read otherwise, are other weights
            for name, coding in placement.codings:
                headers.update(repr((name, coding.decoding, coding.shape, placement.lossless)).encode())
        return {
            "bytes_version": _BYTES_VERSION,
            "recipe": self.plan.recipe.to_dict(),
            "format": self.layout.name,
            "layout": headers.hexdigest(),
            "source": self.marks,
        }

    def _check_resumable(self, partial: PartialFolder) -> set[str]:
        """Raise if another conversion was begun; returns shards that are to be written again nevertheless."""
        manifest, wanted = partial.manifest, self._identity()
        if found := source.difference(manifest.get("source"), self.marks):
            raise SourceChangedError(
                f"{self.checkpoint.path}: changed since the interrupted run that {partial.path} holds: {found}. Remove "
                "that folder to begin anew."
            )
        if manifest.get("bytes_version") != _BYTES_VERSION:
            raise OutputError(
                f"{partial.path}: holds a conversion that another version of octavo began. Go on with that version, or "
                "remove the folder to begin anew."
            )
        different = [key for key in wanted if key != "source" and manifest.get(key) != wanted[key]]
        if different:
            raise OutputError(
                f"{partial.path}: holds an interrupted conversion with another {', '.join(different)}. Give the same "
                "options to go on with it, or remove the folder to begin anew."
            )
        moved = self._made_from(source.moved(manifest["source"], self.marks)) & partial.finished.keys()
        if moved:
            partial.notes.append(
                f"kept, since samples of their source are what they were, though it is another file by now: "
                f"{', '.join(sorted(moved))}; octavo verify --against compares all of it"
            )
        return self._made_from(source.touched(manifest["source"], self.marks))

    def _made_from(self, names: set[str]) -> set[str]:
        """The shards that are made from those of the source."""
        pairs = zip(self.checkpoint.shards, self.shards, strict=True)
        return {made.name for shard, (made, _) in pairs if shard.path.name in names}

    def _check_room(self, partial: PartialFolder) -> None:
        needed = sum(shard.nbytes for shard, _ in self.shards if shard.name not in partial.finished)
        total, _, free = shutil.disk_usage(partial.descriptor)
        if total and needed > free:  # some file systems, of memory or of a network, do not tell
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
        total = sum(plan.stored_bytes for _, plan in self.shards)
        before = 0
        with Finisher.of(partial) as finisher:
            for read, (shard, plan) in zip(self.checkpoint.shards, self.shards, strict=True):
                if shard.name not in partial.finished:
                    shown = share_of(progress, before, plan.stored_bytes, total)
                    file = finisher.open(shard, permissions(read.path))
                    digests = ShardDigests(shard.header) if self.digests else None
                    self._write_shard(finisher, file, shard, plan, budget, tally, shown, digests)
                    finisher.submit(file, shard, digests)
                before += plan.stored_bytes

    def _write_shard(
        self,
        finisher: Finisher,
        file: OutFile,
        shard: ShardLayout,
        plan: Plan,
        budget: Budget,
        tally: Tally,
        progress: Callable[[int, int], None] | None,
        digests: ShardDigests | None,
    ) -> None:
        file.write(memoryview(shard.header), 0)
        for offset, data in shard.constants:
            file.write(memoryview(data), offset)
            if digests is not None:
                digests.add(offset, offset, memoryview(data))
        sink = ShardSink(
            file, shard.weights, shard.scales, self.layout.stored_scale, self.layout.to_bytes, digests, shard.groups
        )
        stream = Stream(self.checkpoint, plan, sink, budget=budget, tally=tally, checks=self.checks)
        finisher.fill(stream, file).run(progress)

    def write_rest(self, partial: PartialFolder) -> None:
        """Config, tokenizer files, index."""
        result, folder = partial.result, self.checkpoint.folder
        # made from the config as it was planned with; whoever reads the result reads them together
        if read_config(self.checkpoint.path) != self.checkpoint.stored_config:
            raise SourceChangedError(f"{folder / 'config.json'}: changed since it was opened. Run again.")
        try:
            for file in self.small_files:
                file.copy(result)
            config = {key: value for key, value in self.checkpoint.config.items() if key != WEIGHTS_KEY}
            if self.checkpoint.stored_config:
                if self.quantization is not None:
                    config["quantization_config"] = dict(self.quantization)
                result.write("config.json", json.dumps(config, indent=2) + "\n", permissions(folder / "config.json"))
            if len(self.shards) > 1:
                index = folder / INDEX_NAME
                made_from = index if index.is_file() else self.checkpoint.shards[0].path
                result.write(INDEX_NAME, self._index(), permissions(made_from))
            if self.digests:
                found = {shard.name: partial.digests[shard.name] for shard, _ in self.shards}
                result.write(DIGESTS_NAME, digests_text(found), permissions(self.checkpoint.shards[0].path))
        except OSError as error:
            raise disk_error(result.path, error) from error

    def publish(self, partial: PartialFolder) -> None:
        """Make the complete folder appear under its name."""
        self.checkpoint.check_unchanged()  # or it would be of two sources
        try:
            partial.publish(self.dst)
        except OSError as error:
            raise disk_error(self.dst, error) from error

    def notes(self) -> list[str]:
        """Remarks about files of the source's folder that are not in the result."""
        folders = [entry.name for entry in sorted(self.checkpoint.folder.iterdir()) if entry.is_dir()]
        copied = {file.folders[0][0] for file in self.small_files if file.folders}
        visible = [name for name in folders if not name.startswith(".") and name not in copied]
        skipped = visible and self.checkpoint.path.is_dir()
        return [*self.remarks, *([f"subfolders are not copied: {', '.join(visible)}"] if skipped else [])]

    def _index(self) -> str:
        total = sum(p.nbytes for p in self.plan.placements)
        total += sum(self.layout.scale_bytes(p) for p in self.plan.quantized)
        total += sum(len(data) for shard, _ in self.shards for _, data in shard.constants)
        weight_map = {name: shard.name for shard, _ in self.shards for name in shard.tensor_names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        return json.dumps(index, indent=2) + "\n"


def partial_of(dst: Path) -> Path:
    """The folder that a conversion to ``dst`` writes into until it is complete."""
    return dst.with_name(dst.name + ".partial")
