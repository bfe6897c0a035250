"""A folder that octavo writes into. Entries are reached by name in the open folder, and links are never followed."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import OutputError
from ..streaming.outfile import sync_folder

_SHOWN = 5


class Folder:
    """A folder held open, so that its entries are those of this very folder whatever becomes of its path."""

    def __init__(self, path: Path, parent: Folder | None = None) -> None:
        self.path = path
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptor: int = (
            os.open(path, flags) if parent is None else os.open(path.name, flags, dir_fd=parent.descriptor)
        )

    def close(self) -> None:
        """Nothing reaches an entry any more: the descriptor's number may soon be that of another folder."""
        descriptor, self.descriptor = self.descriptor, -1
        with contextlib.suppress(OSError):  # nothing is written by way of it
            os.close(descriptor)

    def names(self) -> set[str]:
        return set(os.listdir(self.descriptor))

    def lstat(self, name: str) -> os.stat_result | None:
        """Of the entry itself, if it is a link; None if there is none."""
        try:
            return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def is_file(self, name: str) -> bool:
        """Return True for a regular file, and False for a link to one."""
        found = self.lstat(name)
        return found is not None and stat.S_ISREG(found.st_mode)

    def is_folder(self, name: str) -> bool:
        """Return True for a folder, and False for a link to one."""
        found = self.lstat(name)
        return found is not None and stat.S_ISDIR(found.st_mode)

    def is_at(self, name: str, descriptor: int) -> bool:
        """Return True if the entry is what ``descriptor`` was opened from."""
        found = self.lstat(name)
        return found is not None and os.path.samestat(found, os.fstat(descriptor))

    def opener(self, path: str, flags: int, mode: int = 0o666) -> int:
        """Open an entry, for the built-in `open` and for `OutFile`; only the last part of ``path`` counts.

        Of a new file, ``mode`` is what may be done with it, less the umask. A named pipe is not waited for.
        """
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(os.path.basename(path), flags, mode, dir_fd=self.descriptor)

    @contextlib.contextmanager
    def new_file(self, name: str, mode: int = 0o666) -> Iterator[BinaryIO]:
        """A file under a name that is free; on the disk at the end."""
        with open(name, "xb", opener=functools.partial(self.opener, mode=mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())

    def write(self, name: str, text: str, mode: int = 0o666) -> None:
        with self.new_file(name, mode) as file:
            file.write(text.encode())

    def rename(self, old: str, new: str) -> None:
        os.replace(old, new, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def remove(self, name: str, made: Collection[str] = ()) -> None:
        """Remove a file; or a folder, and from it what is among ``made``, by paths from here. Else it stays."""
        if not self.is_folder(name):
            os.unlink(name, dir_fd=self.descriptor)
            return
        with contextlib.closing(Folder(self.path / name, self)) as folder:
            mine = _by_folder(made).get(name, set())
            for entry in folder.names() & {path.partition("/")[0] for path in mine}:
                folder.remove(entry, mine)
        os.rmdir(name, dir_fd=self.descriptor)

    # -- folders below ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def below(self, name: str, mode: int) -> Iterator[Folder]:
        """A folder in this one, which is made if need be; what was written to it is on the disk at the end."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=self.descriptor)
        with contextlib.closing(Folder(self.path / name, self)) as folder:
            yield folder
            sync_folder(folder.descriptor)

    def absent(self, paths: Collection[str]) -> set[str]:
        """Those of the paths where there is nothing, here or in folders below."""
        gone = {path for path in paths if "/" not in path and self.lstat(path) is None}
        for name, inner in _by_folder(paths).items():
            if self.is_folder(name):
                with contextlib.closing(Folder(self.path / name, self)) as folder:
                    inner = folder.absent(inner)
            gone |= {f"{name}/{path}" for path in inner}
        return gone

    def refuse_others(self, made: Collection[str]) -> None:
        """Raise unless all that is here, and in folders below, is among these paths, and a file."""
        folders, names = _by_folder(made), self.names()
        others = (n for n in names if not (self.is_folder(n) if n in folders else n in made and self.is_file(n)))
        self.refuse(others)
        for name in names & folders.keys():
            with contextlib.closing(Folder(self.path / name, self)) as folder:
                folder.refuse_others(folders[name])

    def refuse(self, names: Iterable[str]) -> None:
        """Raise if one of these entries, which octavo did not make, is there."""
        shown = []
        for name in sorted(names):
            found = self.lstat(name)
            if found is not None:
                shown.append(f"{name!r} (a link)" if stat.S_ISLNK(found.st_mode) else repr(name))
        if len(shown) > _SHOWN:
            shown[_SHOWN:] = [f"{len(shown) - _SHOWN} more"]
        if shown:
            raise OutputError(
                f"{self.path}: holds {', '.join(shown)}, not made by octavo. Move it out of there and run the command "
                "again, or name another target."
            )


def _by_folder(paths: Iterable[str]) -> dict[str, set[str]]:
    """Folders -> the paths that lead into them, from there."""
    found: dict[str, set[str]] = {}
    for path in paths:
        folder, slash, inner = path.partition("/")
        if slash:
            found.setdefault(folder, set()).add(inner)
    return found


def permissions(path: Path) -> int:
    """What a file or folder that is made from ``path`` is given, less the umask: no more, as `cp` does.

    Whoever owns it may always read and write.
    """
    return stat.S_IMODE(path.stat().st_mode) & 0o777 | stat.S_IRUSR | stat.S_IWUSR
