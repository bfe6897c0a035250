"""``DST.partial``, into which a conversion writes until it is complete: a folder of octavo's own, or none.

    octavo.lock      written first and removed last: octavo's mark, and the lock against other processes
    manifest.json    what is converted and how, which files octavo makes in checkpoint/, which shards are finished
    checkpoint/      the result; until a shard is finished, its name ends in .part and has that of its run

A folder that holds anything else, or no mark, is refused before anything in it is changed. Entries are reached by name
in the open folder, links are never followed, and files are made under names that are free. What goes is unlinked
one by one, if the manifest says that octavo made it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.files import conforms, is_there, read_object
from ..checkpoint.header import MAX_HEADER_BYTES
from ..errors import CheckpointError, OutputError
from ..streaming.outfile import disk_error, sync_folder
from .folder import Folder

_LOCK, _MANIFEST, _RESULT = "octavo.lock", "manifest.json", "checkpoint"
#: ends the names of files that are not complete
_PART = ".part"
_MAX_NAME_BYTES = 255  # of any file system
#: never changed, so that later versions know the folders of earlier ones
_MARK = b"""\
octavo convert has not finished what it writes into this folder. The command that began goes on when it is run again.
To begin anew, remove the folder.
"""


class PartialFolder(Folder):
    """``DST.partial``, locked, with what it holds of an earlier run."""

    result: Folder
    manifest: dict[str, Any]  # empty where nothing was begun
    _wanted: set[str]  # the files of the result
    _made: os.stat_result  # the folder that becomes the result

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # no other run may ever rename, or write to, what this one has begun
        self._run = f"run-{secrets.token_hex(4)}"
        self._writers: Callable[[], None] = lambda: None
        self.notes: list[str] = []  # for the report
        self._verify = False  # whether this run compares what it reads with the source's digests
        self._process = os.getpid()
        self._held = -1  # the lock

    @classmethod
    @contextlib.contextmanager
    def locked(cls, path: Path, mode: int = 0o777) -> Iterator[PartialFolder]:
        """Make the folder, or take it up again, and keep other processes out of it.

        Args:
            mode: of the folders that are made, less the umask.
        """
        with contextlib.ExitStack() as stack:
            try:
                with contextlib.suppress(FileExistsError):
                    path.mkdir(mode)
                partial = cls(path)
                stack.callback(partial.close)
                stack.callback(partial._unlock)
                partial._lock()
                stack.callback(lambda: partial._writers())
            except NotADirectoryError:
                raise OutputError(
                    f"{path}: is a link or a file, which octavo did not make. Move it, or name another target."
                ) from None
            except OSError as error:
                raise OutputError(f"{path}: can't be made: {error.strerror}") from error
            try:
                if partial.is_file(_MANIFEST + _PART):
                    partial.remove(_MANIFEST + _PART)
                with contextlib.suppress(FileExistsError):
                    os.mkdir(_RESULT, mode, dir_fd=partial.descriptor)
                partial.result = Folder(path / _RESULT, partial)
                stack.callback(partial.result.close)
                partial._made = os.fstat(partial.result.descriptor)
                partial.manifest = partial._read_manifest()
            except OSError as error:
                raise disk_error(path, error) from error
            yield partial

    # -- whose it is --------------------------------------------------------------------------------------------------

    def _lock(self) -> None:
        """Keep other processes out, or raise; `_unlock` must follow in any case."""
        names = self.names()
        files = {name for name in (_LOCK, _MANIFEST, _MANIFEST + _PART) if self.is_file(name)}
        self.refuse(names - files - ({_RESULT} if self.is_folder(_RESULT) else set()))
        if _LOCK not in names:
            self.refuse(names)
        self._held = self.opener(_LOCK, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{self.path}: another process is converting into it") from None
        except OSError as error:
            raise OutputError(
                f"{self.path}: can't be locked against other processes: {error.strerror}. Name a target on a file "
                "system that can lock files."
            ) from error
        if not self.is_at(_LOCK, self._held):
            raise OutputError(f"{self.path}: another process was converting into it. Run the same command again.")
        self._mark(self._held)

    def _unlock(self) -> None:
        held, self._held = self._held, -1
        if held < 0:
            return
        with contextlib.suppress(OSError):  # closing it does the same, and what was written to it is on the disk
            if os.getpid() == self._process:  # what is forked has the lock too, and may live longer
                fcntl.flock(held, fcntl.LOCK_UN)
        with contextlib.suppress(OSError):
            os.close(held)

    def keep_for(self, writers: Callable[[], None]) -> None:
        """Keep other processes out until ``writers`` has returned, which waits for all that may still write."""
        self._writers = writers

    def _mark(self, lock: int) -> None:
        """Find octavo's mark. Where there is nothing else, make it, or complete what a killed run began."""
        found = os.pread(lock, len(_MARK) + 1, 0)
        if found == _MARK:
            return
        names = self.names()
        if names != {_LOCK} or not _MARK.startswith(found) or os.fstat(lock).st_nlink != 1:
            self.refuse(names)
        with open(lock, "wb", closefd=False) as file:
            file.write(_MARK)
        os.fsync(lock)

    # -- what it holds ------------------------------------------------------------------------------------------------

    def _read_manifest(self) -> dict[str, Any]:
        if self.lstat(_MANIFEST) is None:
            return {}
        try:
            manifest = read_object(self.path / _MANIFEST, MAX_HEADER_BYTES, opener=self.opener)
        except CheckpointError as error:
            if isinstance(error.__cause__, OSError):  # it may be sound
                raise error.__cause__ from None
            raise OutputError(f"{error}: damaged; remove {self.path}") from error
        kinds = {
            "files": list[str],
            "finished": dict[str, int],
            "digests": dict[str, dict[str, Any]] | None,
            "verified": list[str] | None,
        }
        if not all(conforms(manifest.get(key), kind) for key, kind in kinds.items()):
            raise OutputError(f"{self.path / _MANIFEST}: damaged; remove {self.path}")
        return manifest

    @property
    def finished(self) -> dict[str, int]:
        """Shards that are complete, and on the disk, and their sizes."""
        finished: dict[str, int] = self.manifest.get("finished", {})
        return finished

    @property
    def digests(self) -> dict[str, Any]:
        """The digests of finished shards, where they were asked for."""
        digests: dict[str, Any] | None = self.manifest.get("digests")
        return {} if digests is None else digests

    @property
    def verified(self) -> list[str]:
        """Finished shards whose source was compared with its digests while it was read."""
        verified: list[str] | None = self.manifest.get("verified")
        return [] if verified is None else verified

    def take_up(
        self,
        identity: dict[str, Any],
        shards: Sequence[str],
        others: Sequence[str],
        anew: Collection[str] = (),
        *,
        digests: bool = False,
        verify: bool = False,
    ) -> None:
        """Keep finished shards, remove all else that an earlier run left, and note which files this one is to make.

        Unfinished shards go so that their room is free, and small files since they are copied anew.

        Args:
            anew: shards that are to be written again, though they are finished.
            digests: so are those of which there are no digests.
            verify: so are those that were made from what nothing compared with the source's digests.
        """
        self._verify = verify
        made, result = set(self.manifest.get("files", ())), self.result
        names = result.names()
        result.refuse_others(made)
        sizes = {name: found.st_size for name in names if (found := result.lstat(name))}
        known = self.finished.keys() & set(shards)
        known &= self.digests.keys() if digests else known
        known &= set(self.verified) if verify else known
        finished = {name: self.finished[name] for name in sorted(known) if sizes.get(name) == self.finished[name]}
        if again := [name for name in anew if finished.pop(name, None) is not None]:
            self.notes.append(f"written again, since their source was touched meanwhile: {', '.join(sorted(again))}")
        for name in names - finished.keys():
            result.remove(name, made)
        self._wanted = {*shards, *others}
        files = self._wanted.union(map(self.part_of, shards))
        kept = {name: found for name, found in self.digests.items() if name in finished}
        verified = [name for name in self.verified if name in finished]
        self.manifest = {
            **identity,
            **{"files": sorted(files), "finished": finished, "digests": kept, "verified": verified},
        }
        self._write_manifest()

    def _write_manifest(self) -> None:
        """Replace it, so that a reader finds either the old or the new one."""
        self.write(_MANIFEST + _PART, json.dumps(self.manifest, indent=1))
        self.rename(_MANIFEST + _PART, _MANIFEST)

    def part_of(self, shard: str) -> str:
        """The name of a shard that this run has not finished."""
        name = f"{self._run}-{shard}{_PART}"
        if len(os.fsencode(name)) > _MAX_NAME_BYTES:
            name = f"{self._run}-{hashlib.sha256(os.fsencode(shard)).hexdigest()}{_PART}"
        return name

    def finish(self, shard: str, nbytes: int, digests: dict[str, Any] | None = None) -> None:
        """Note that a shard, synced, is complete, and its digests."""
        self.result.refuse([shard])
        self.result.rename(self.part_of(shard), shard)
        self.finished[shard] = nbytes
        if digests is not None:
            self.digests[shard] = digests
        if self._verify:
            self.verified.append(shard)
        self._write_manifest()

    def publish(self, dst: Path) -> None:
        """Make the complete result appear as ``dst``, and remove the rest."""
        result = self.result
        result.refuse_others(self._wanted)
        if gone := result.absent(self._wanted):
            raise OutputError(f"{result.path}: {', '.join(sorted(gone))}: gone. Run the same command again to go on.")
        if not self.is_at(_RESULT, result.descriptor):
            self.refuse([_RESULT])
        check_free(dst)
        sync_folder(result.descriptor)
        try:
            os.rename(_RESULT, dst, src_dir_fd=self.descriptor)
            self._leave(dst)
        except BaseException as error:
            if not self.became(dst):
                raise
            self._leave(dst)
            if not isinstance(error, OSError):  # of a server whose answer was lost
                raise

    def _leave(self, dst: Path) -> None:
        """Remove what is left, as far as it is there. The result is complete: no failure may say otherwise."""
        with contextlib.suppress(OSError):
            _sync(dst.parent)
        for name in (_MANIFEST, _LOCK):
            with contextlib.suppress(OSError):
                self.remove(name)
        try:
            if os.path.samestat(os.lstat(self.path), os.fstat(self.descriptor)):
                self.path.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            self.notes.append(f"{self.path} could not be removed: nothing in it is needed any more")

    def became(self, path: Path) -> bool:
        """Return True if the result is there by now."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.lstat(path), self._made)
        return False


def check_free(dst: Path) -> None:
    """Raise if something has the name already."""
    if is_there(dst):
        raise OutputError(f"{dst}: exists already. Remove it or name another folder; octavo overwrites nothing.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_folder(descriptor)
    finally:
        os.close(descriptor)
