"""What a plan depends on, in words that are the same in every process in which it is the same.

    checkpoint    headers, json files, shapes that come from elsewhere
    code          files of all modules that are imported, by path, size and times; Python's own and torch's by version
    settings      an engine's config, as deep as it goes, and its environment variables
    model         classes of modules, their plain attributes; shapes, places and dtypes of all tensors

Objects are told apart by their class and what they hold; of what holds nothing that can be seen, the class counts.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import enum
import functools
import hashlib
import itertools
import os
import re
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import octavo

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.files import open_regular, read_bounded
from ...elements.operations import storage_key
from ...machine import on_cpu

#: file -> what the system keeps of it; None where there is none
Files = dict[str, tuple[int, int, int] | None]

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
_TIMES = (datetime.date, datetime.time, datetime.timedelta)
_SHOWN = (
    torch.dtype,
    torch.device,
    torch.Size,
    PurePath,
    slice,
    range,
    str,
    int,
    float,
    bytearray,
    *_TIMES,
)
_LISTS = (list, tuple, collections.deque)
_GROUPS = (*_LISTS, dict, set, frozenset, Mapping)  # asking for a Mapping takes longest
_FUNCTIONS = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)
_WORDS = (*_PLAIN, *_SHOWN, *_FUNCTIONS, Tensor, enum.Enum, re.Pattern)
#: known by their versions; octavo's files count whether they are imported or not, as threads of it import some
_BY_VERSION = frozenset({"torch", "triton", "octavo", *sys.stdlib_module_names})
#: where processes meet, what they call each other, draw and hash: new at every start
_OF_THE_START = re.compile(
    r"(^|_)(ports?|port_list|random_seed|object_hash|ips?|addr|addresse?s?|hosts?|ident|(instance|engine|run)_id)$",
    re.I,
)
#: what is in longer lists counts as far as a word tells; larger tables of integers by their shapes
_MANY, _TABLE_BYTES = 4096, 1 << 16
_INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_DEPTH, _MOST_WORDS = 16, 1_000_000
_MAX_JSON_BYTES = 1 << 28
#: what every module has
_OF_ANY_MODULE = frozenset(vars(nn.Module()))


def digest(*facts: str) -> str:
    """A name for some facts."""
    return hashlib.sha256("\0".join(facts).encode("utf-8", "surrogatepass")).hexdigest()


# -- objects ----------------------------------------------------------------------------------------------------------


class _Description:
    """Words for objects. Whether two are one, or only alike, does not matter, nor whether a list is a tuple.

    Args:
        depth: as how many objects within each other are looked into. Lists and the like don't count.
    """

    def __init__(self, depth: int) -> None:
        self.words: list[str] = []
        self._depth = depth
        self._within: set[int] = set()  # what is being described: it may hold itself

    def add(self, value: Any, depth: int = 0) -> None:
        if type(value) in _PLAIN:  # most are
            self.words.append(repr(value))
            return
        if isinstance(value, functools.partial):
            value = [value.func, value.args, value.keywords]
        if isinstance(value, _WORDS):
            self.words.append(_word(value))
        elif id(value) in self._within:
            self.words.append("...")
        else:
            self._within.add(id(value))
            self._add_parts(value, depth)
            self._within.discard(id(value))
        if len(self.words) > _MOST_WORDS:
            raise ValueError("there is too much that it depends on")

    def _add_parts(self, value: Any, depth: int) -> None:
        if isinstance(value, _GROUPS):
            self.words.append(f"{'{' if isinstance(value, Mapping) else '['}{len(value)}")
            if len(value) > _MANY:
                parts = itertools.chain.from_iterable(value.items()) if isinstance(value, Mapping) else value
                words = map(_word, parts)
                self.words.append(digest(*(sorted(words) if isinstance(value, (set, frozenset)) else words)))
            elif isinstance(value, Mapping):
                self._add_pairs(value.items(), depth)
            elif isinstance(value, _LISTS):
                for part in value:
                    self.add(part, depth)
            else:
                self._add_sorted(value, depth)
            return
        self.words.append(_word(value))
        if depth < self._depth and not isinstance(value, (nn.Module, types.ModuleType)):
            self._add_pairs(_fields(value), depth + 1)
            self.words.append(")")

    def _add_sorted(self, parts: Iterable[Any], depth: int) -> None:
        begin, found = len(self.words), []
        for part in parts:
            self.add(part, depth)
            found.append(self.words[begin:])
            del self.words[begin:]
        for words in sorted(found):
            self.words += words

    def _add_pairs(self, pairs: Iterable[tuple[Any, Any]], depth: int) -> None:
        for name, value in pairs:
            if not (isinstance(name, str) and _OF_THE_START.search(name)):
                self.words.append(_word(name))
                self.add(value, depth)


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, be it in a dictionary or in slots."""
    yield from getattr(value, "__dict__", {}).items()
    names = [*getattr(type(value), "__struct_fields__", ())]  # of msgspec
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names += (slots,) if isinstance(slots, str) else slots
    for name in dict.fromkeys(names):
        if name not in ("__dict__", "__weakref__") and hasattr(value, name):
            yield name, getattr(value, name)


def _word(value: Any) -> str:
    """All that there is to say of some values, and the class of others."""
    kind = type(value)
    if kind in _PLAIN:
        return repr(value)
    if isinstance(value, Tensor):
        return _of_tensor(value)
    if isinstance(value, enum.Enum):
        return f"{kind.__qualname__}.{value.name}"
    if isinstance(value, _SHOWN):
        return f"{kind.__qualname__} {value!r}"
    if isinstance(value, re.Pattern):  # which shows only its beginning
        return f"{kind.__qualname__} {value.pattern!r} {value.flags}"
    if kind.__module__ == "numpy" and hasattr(value, "tobytes"):
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    named = value if isinstance(value, _FUNCTIONS) else kind
    code = getattr(named, "__code__", None)
    return f"{named.__module__}.{named.__qualname__}{_of_code(code) if isinstance(code, types.CodeType) else ''}"


@functools.lru_cache(maxsize=4096)
def _of_code(code: types.CodeType) -> str:
    """Words for code that is in no file, as a notebook's; files are told apart by their states."""
    if os.path.exists(code.co_filename):
        return ""
    words = [code.co_code.hex(), *code.co_names, *code.co_varnames, *code.co_freevars]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            words.append(_of_code(constant))
        else:
            words.append(repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant))
    return f" {digest(*words)}"


def _of_tensor(tensor: Tensor) -> str:
    dtype = tensor.dtype
    told = f"{dtype} {tuple(tensor.shape)} {tensor.layout} {_of_place(tensor.device)}"
    if tensor.layout is not torch.strided or is_lazy(tensor):
        return told
    told = f"{told} {tensor.stride()} {tensor.storage_offset()}"
    tells = dtype in _INTEGERS and not isinstance(tensor, nn.Parameter)
    if tells and not tensor.is_meta and tensor.nbytes <= _TABLE_BYTES:
        told += f" {tensor.tolist()}"
    return told


@functools.cache
def _of_place(device: torch.device) -> str:
    """A word for where a tensor is; which of several devices does not matter."""
    return "here" if on_cpu(str(device)) else device.type


def of_settings(*settings: Any) -> str:
    """Words for an engine's config and the like, as deep as they go."""
    description = _Description(_DEPTH)
    description.add(settings)
    return "\n".join(description.words)


class _Deep(_Description):
    """Also of what functions have at hand; keeps the tensors that it comes by."""

    def __init__(self) -> None:
        super().__init__(_DEPTH)
        self.tensors: list[Tensor] = []

    def add(self, value: Any, depth: int = 0) -> None:
        if isinstance(value, Tensor):
            self.tensors.append(value)
        super().add(value, depth)
        if isinstance(value, types.FunctionType) and id(value) not in self._within:
            self._within.add(id(value))
            for cell in value.__closure__ or ():
                with contextlib.suppress(ValueError):  # it holds nothing yet
                    self.add(cell.cell_contents, depth + 1)
            self._within.discard(id(value))


def deep(value: Any) -> tuple[list[str], list[Tensor]]:
    """Words for an object, as deep as it goes and with what its functions have at hand; the tensors that these hold."""
    description = _Deep()
    description.add(value)
    return description.words, description.tensors


def places(parallel_state: types.ModuleType) -> dict[str, tuple[int, int]]:
    """The groups of ranks that an engine's module holds -> the place of this one, of how many."""
    return {
        name: (group.rank_in_group, group.world_size)
        for name, group in vars(parallel_state).items()
        if isinstance(group, parallel_state.GroupCoordinator)
    }


def of_device(device: torch.device) -> str:
    """Words for a device; which of several like it does not matter."""
    return f"{device.type} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def of_environment(prefixes: Collection[str]) -> str:
    """Words for the environment variables that begin so."""
    found = {name: value for name, value in os.environ.items() if name.startswith(tuple(prefixes))}
    return "\n".join(f"{name}={found[name]!r}" for name in sorted(found) if not _OF_THE_START.search(name))


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def of_checkpoint(checkpoint: Checkpoint) -> str:
    """Words for the files that were opened.

    Raises:
        SourceChangedError: they are no longer those.
    """
    words = []
    for shard in checkpoint.shards:
        with open_regular(shard.path) as file:
            shard.check_is(os.fstat(file.fileno()))
            length = file.read(8)
            header = hashlib.sha256(file.read(int.from_bytes(length, "little"))).hexdigest()
        words.append(f"{shard.path.name} {shard.nbytes} {length.hex()} {header}")
    words += [
        f"{path.name} {hashlib.sha256(read_bounded(path, _MAX_JSON_BYTES)).hexdigest()}"
        for path in sorted(checkpoint.folder.glob("*.json"))
    ]
    if checkpoint.source is not None:  # some shapes are said by weights
        words += [f"{info.name} {info.shape}" for info in checkpoint.tensors.values()]
    return "\n".join(words)


# -- code -------------------------------------------------------------------------------------------------------------


def of_versions() -> str:
    """Words for what is known by its version."""
    return f"{sys.version} torch {torch.__version__} {torch.version.git_version} octavo {octavo.__version__}"


def is_known_by_version(module: str) -> bool:
    """Return True for a module, by its name, whose code `of_versions` tells, or `octavos`."""
    return module.partition(".")[0] in _BY_VERSION


def imported() -> set[str]:
    """The files of all modules that are imported, but for those that are known by their versions."""
    found = set()
    for name, module in [*sys.modules.items()]:
        if not is_known_by_version(name):
            # of some, asking for an attribute imports them
            file = getattr(module, "__dict__", {}).get("__file__")
            if isinstance(file, str):
                found.add(file)
    return found


def octavos() -> set[str]:
    """The files of octavo."""
    return {str(path) for path in Path(octavo.__file__).parent.rglob("*.py")}


def states(files: Iterable[str]) -> Files:
    """What the system keeps of files. The time of change is its own: who restores the other can't restore it."""
    return {file: _state(file) for file in sorted(files)}


def _state(file: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except NotADirectoryError:  # within an archive
        return _state(os.path.dirname(file))
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


# -- a model ----------------------------------------------------------------------------------------------------------


def of_model(model: nn.Module) -> dict[tuple[str, str], str]:
    """Where something is in a model -> words for it: its tensors, what these and its modules hold beside them."""
    description = _Description(0)
    found, classes = {}, dict[type, str]()

    def words(value: Any) -> str:
        before = len(description.words)
        description.add(value)
        return "\n".join(description.words[before:])

    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        if kind not in classes:
            classes[kind] = words([kind, getattr(kind, "load_weights", None)])
        found[path, ""] = classes[kind]
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            found[path, name] = repr(tensor) if tensor is None else f"{_of_tensor(tensor)} {words(vars(tensor))}"
        for name, value in vars(module).items():
            if name not in _OF_ANY_MODULE:
                found[path, name] = repr(value) if type(value) in _PLAIN else words(value)
    return found


def held(model: nn.Module) -> dict[tuple[str, str], tuple[int, ...]]:
    """Where something is in a model -> what it is, in this process: another object, or another state of a tensor."""
    return {(path, name): _identity(value) for path, name, value in _attributes(model)}


def _attributes(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    for path, module in model.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items(), *module._modules.items()):
            yield path, name, value
        for name, value in vars(module).items():
            if name not in _OF_ANY_MODULE and type(value) not in _PLAIN:
                yield path, name, value


def _identity(value: Any) -> tuple[int, ...]:
    if not isinstance(value, Tensor):
        return (id(value),)
    return id(value), storage_key(value) or 0, -1 if value.is_inference() else value._version
