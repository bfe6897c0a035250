"""Small files of others, read whole: regular files only, no more bytes than are expected, and JSON within bounds."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, NamedTuple, Union, get_args, get_origin

from ..errors import CheckpointError, OctavoError, reading

#: opens a path with flags, as that of the built-in `open` does
Opener = Callable[[str, int], int]

#: of a config
MAX_CONFIG_BYTES = 16 << 20
#: of the nesting of JSON that octavo reads, and may write again
MAX_DEPTH = 64
#: lists and objects in it: three for each of the most tensors that a checkpoint may have, and more
MAX_PARTS = 2_000_000
#: of a number in it
MAX_DIGITS = 100
#: nesting for which the stack of any thread has room
_PARSED_SAFELY = 10_000
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
#: one in JSON, or the rest of a text without its end: it always matches, and so in a time that grows with the length
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
#: where a number begins, and not within a file's name; found in a moment, since it begins with what it is about
_MINUS_ZERO = re.compile(rb"-0(?<![^\s\[,:]-0)")
#: maps digits to zero, so that a run of them is found in a moment
_DIGITS, _MANY_DIGITS = bytes(0 if chr(byte).isdecimal() else 1 for byte in range(256)), bytes(MAX_DIGITS)


def local_path(path: str | os.PathLike[str], kind: type[OctavoError] = CheckpointError) -> Path:
    """What a user gave as a path, with ``~`` expanded; an error of that kind where it can't be the path of anything."""
    try:
        text = os.fspath(path)
        if isinstance(text, str) and "\0" not in text:
            return Path(text).expanduser()
    except (TypeError, RuntimeError) as error:  # no path; no such user, or a user without a home
        raise kind(f"{path!r}: not a path here: {error}") from error
    raise kind(f"{path!r}: not a path: paths are text, without NUL characters")


class Identity(NamedTuple):
    """What a system keeps of a file: it changes when another file has the path, and when this one is written to.

    The time of change (ctime) is the system's own: who restores the time of modification can't restore it.
    """

    device: int
    inode: int
    nbytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Identity:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def is_there(path: str | os.PathLike[str]) -> bool:
    """Return True if the path has an entry, be it a link to nothing.

    Unlike `os.path.lexists`, it does not take a disk that does not answer for an entry that is not there.

    Raises:
        OSError: it can't be told.
    """
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def open_regular(path: str | os.PathLike[str], opener: Opener = os.open) -> BinaryIO:
    """Open a regular file for reading; an OSError for all else. Nothing waits for the other end of a named pipe."""

    def open_(path: str, flags: int) -> int:
        # `open` takes it over at once, so that it is closed only once, wherever an interrupt comes
        descriptor = opener(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", path)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise

    return open(os.fspath(path), "rb", opener=open_)


def read_bounded(path: str | os.PathLike[str], max_bytes: int, opener: Opener = os.open) -> bytes:
    """All of a regular file; a ValueError where it is larger than ``max_bytes``."""
    with open_regular(path, opener) as file:
        content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            size = max(os.fstat(file.fileno()).st_size, len(content))
            raise ValueError(f"{size:,} bytes long; of such a file octavo reads at most {max_bytes:,}")
        return content


def read_object(
    path: Path, max_bytes: int = MAX_CONFIG_BYTES, *, unique: bool = True, opener: Opener = os.open
) -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
        unique: whether a key that appears twice in one object is an error. Else the last one counts.

    Raises:
        CheckpointError: the file can't be read, is too large, or holds something else.
    """
    with reading(path):
        value = parse_json(read_bounded(path, max_bytes, opener), unique=unique)
        _check_depth(value)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value


def parse_json(raw: bytes, *, unique: bool = True) -> Any:
    """The value of a JSON text in UTF-8; a ValueError in words for people where it is none."""
    # without parsing: each costs twenty times its text
    parts = raw.count(b"[") + raw.count(b"{")
    if parts > MAX_PARTS:
        raise ValueError(f"{parts:,} lists and objects; at most {MAX_PARTS:,} are taken")
    if parts > _PARSED_SAFELY < sys.getrecursionlimit():
        _check_nesting(raw)
    try:
        # rarely there, and a call for each number takes time
        parse_int = _integer if _MINUS_ZERO.search(raw) or _MANY_DIGITS in raw.translate(_DIGITS) else None
        pairs_hook = _unique_keys if unique else None
        return json.loads(raw.decode("utf-8"), object_pairs_hook=pairs_hook, parse_int=parse_int)
    except _DuplicateKeyError:
        raise
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from error


def _check_nesting(raw: bytes) -> None:
    """Raise a ValueError for a text that nests so deeply that its parser could run out of stack, and end the process.

    Python's own bound is what a program may have raised.
    """
    brackets = _STRING.sub(b"", raw).translate(None, _NO_BRACKETS)
    steps = (1 if byte in b"[{" else -1 for byte in brackets)
    if max(itertools.accumulate(steps), default=0) > _PARSED_SAFELY:
        raise ValueError("not valid JSON: nested too deeply")


def _integer(text: str) -> int | float:
    """An integer; of "-0", which other readers take for no integer, a float."""
    if len(text) > MAX_DIGITS:  # Python takes a time that grows with the square of their number
        raise ValueError(f"a number of {len(text):,} digits; at most {MAX_DIGITS} are taken")
    return float(text) if text == "-0" else int(text)


class _DuplicateKeyError(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(f"the key {key!r} appears twice")
            seen.add(key)
    return result


def _check_depth(value: Any) -> None:
    """Raise unless a value can be walked, and written again, without fear for the stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for each in level for part in _parts(each)]
        if not level:
            return
    raise ValueError(f"not valid JSON: nested deeper than {MAX_DEPTH}")


def _parts(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (part for part in inner if isinstance(part, (dict, list)))


# -- what is in them --------------------------------------------------------------------------------------------------


def conforms(value: Any, kind: Any) -> bool:
    """Return True if a parsed value is of a kind such as ``int``, ``dict[str, str]`` or ``list[str] | None``.

    A bool is no int here.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(conforms(value, one) for one in arguments)
    if origin is list:
        return isinstance(value, list) and _all_conform(value, arguments[0])
    if origin is dict:
        return (
            isinstance(value, dict) and _all_conform(value, arguments[0]) and _all_conform(value.values(), arguments[1])
        )
    return kind is Any or type(value) is (type(None) if kind is None else kind)


def _all_conform(values: Collection[Any], kind: Any) -> bool:
    if type(kind) is type:  # an index holds thousands of strings
        return {*map(type, values)} <= {kind}
    return all(conforms(value, kind) for value in values)
