"""The boundary: what others raise because of their input becomes an `OctavoError`, and all else passes."""

from __future__ import annotations

import errno
import signal
from typing import Any

import pytest

from octavo.errors import (
    CheckpointError,
    DeviceError,
    OctavoError,
    OutputError,
    WeightError,
    boundary,
    of_user,
    public,
    reading,
)


def raising(error: BaseException) -> Any:
    raise error


class OutOfMemoryError(RuntimeError):
    """Named as torch names it."""


FOREIGN = [
    (OSError(errno.EACCES, "Permission denied", "/a/b"), CheckpointError, "/a/b: Permission denied"),
    (OSError(errno.EIO, "Input/output error"), CheckpointError, "here: Input/output error: the disk"),
    (OSError(errno.EMFILE, "Too many open files"), CheckpointError, "raise the limit (ulimit -n)"),
    (OSError("no words of the system"), CheckpointError, "here: no words of the system"),
    (OSError(), CheckpointError, "here: OSError"),
    (OSError(errno.ENOENT, "No such file", b"/a/\xff"), CheckpointError, "No such file"),
    (RecursionError("maximum recursion depth exceeded"), CheckpointError, "here: nested too deeply"),
    (OverflowError("int too large"), CheckpointError, "here: int too large"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"), CheckpointError, "here: 'utf-8' codec can't decode"),
    (MemoryError(), DeviceError, "here: not enough memory. A smaller staging_bytes"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), DeviceError, "9 bytes"),
    (OutOfMemoryError("CUDA out of memory. Tried\nmore"), DeviceError, "(CUDA out of memory. Tried)"),
    (RuntimeError("can't start new thread"), DeviceError, "here: the system starts no more threads"),
]


@pytest.mark.parametrize(("error", "kind", "says"), FOREIGN, ids=lambda value: getattr(value, "__name__", None))
def test_what_input_brings_about_becomes_an_error_of_octavo(error: Exception, kind: type[Exception], says: str) -> None:
    with pytest.raises(OctavoError) as caught, boundary("here", CheckpointError):
        raise error
    assert type(caught.value) is kind
    assert says in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        *(ValueError("x"), TypeError("x"), KeyError("x"), AttributeError("x"), AssertionError("x"), RuntimeError("x")),
        *(KeyboardInterrupt(), SystemExit(3), GeneratorExit(), StopIteration(), WeightError("octavo's own")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_faults_of_octavo_interrupts_and_its_own_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, boundary("here", CheckpointError):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(("error", "kind", "says"), FOREIGN, ids=lambda value: getattr(value, "__name__", None))
def test_what_a_user_s_function_raises_passes(error: Exception, kind: Any, says: Any) -> None:
    given = type(error)(*error.args)
    with pytest.raises(type(error)) as caught, boundary("outer", OutputError), boundary("here", CheckpointError):
        of_user(raising)(given)
    assert caught.value is given


@pytest.mark.parametrize("error", [TimeoutError("mine"), MemoryError("mine"), ValueError("mine")])
def test_what_a_handler_of_a_signal_raises_passes(error: Exception) -> None:
    def handle(*_: Any) -> None:
        raise error

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(type(error)) as caught, boundary("outer", OutputError), reading("here"):
            signal.raise_signal(signal.SIGUSR1)
        assert caught.value is error
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_value_that_is_wrong_is_an_error_only_where_a_file_is_parsed() -> None:
    with pytest.raises(CheckpointError, match=r"^a/config.json: bad$"), reading("a/config.json"):
        raise ValueError("bad")


def test_a_public_function_names_the_path_that_it_was_given() -> None:
    @public(OutputError)
    def work(error: Exception, *, path: str | None = None) -> int:
        """What it does."""
        raise error

    with pytest.raises(OutputError, match=r"^a/b: int too large$"):
        work(OverflowError("int too large"), path="a/b")
    with pytest.raises(OutputError, match=r"^octavo.work: int too large$"):
        work(OverflowError("int too large"))
    assert (work.__name__, work.__doc__) == ("work", "What it does.")
