"""The readers of converted checkpoints that are installed here, and whom of them a conversion asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from .choices import READERS
from .conversion.proof import Absent, Reader
from .errors import MissingExtraError, RecipeError
from .quiet import this_thread_quiet
from .text import told


def chosen(name: str | None) -> Callable[[], Sequence[Reader]]:
    """Find those whom a conversion asks: everybody who is installed, or the one of this name.

    Raises:
        RecipeError: no such reader.
    """
    if name is None:
        return _everybody
    maker = _maker(name)
    return lambda: (maker(),)


def installed(name: str) -> Reader:
    """The reader of this name.

    Raises:
        RecipeError: no such reader.
        MissingExtraError: it is not installed.
    """
    found = _maker(name)()
    if isinstance(found, Absent):
        raise MissingExtraError(name, f"asking {found.name}")
    return found


def _everybody() -> Sequence[Reader]:
    vllm = _vllm()  # first, since it is imported in a process of its own
    return (_transformers(), vllm)


def _maker(name: str) -> Callable[[], Reader]:
    makers = dict(zip(READERS, (_transformers, _vllm), strict=True))
    if name not in makers:
        raise RecipeError(f"unknown reader {name!r}; known: {', '.join(makers)}")
    return makers[name]


def _transformers() -> Reader:
    try:
        with this_thread_quiet():  # what lies beside it is imported, too, and some of that complains
            from .adapters.transformers.reader import TransformersReader
    except ImportError as error:
        if find_spec("transformers") is None:
            return Absent("transformers")
        return Absent("transformers", f"it can't be imported: {told(error)}")
    return TransformersReader()


def _vllm() -> Reader:
    if find_spec("vllm") is None:
        return Absent("vLLM")
    from .adapters.vllm.reader import VllmReader

    return VllmReader()
