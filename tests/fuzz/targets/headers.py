"""Headers of shards, against the parser of the safetensors library."""

from __future__ import annotations

import itertools
import re
import struct
import zlib
from pathlib import Path
from random import Random
from typing import Any

import safetensors

import octavo
from octavo import OctavoError
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.dtypes import BITS

from ..jsontext import Object, Raw, encode, parse
from ..mutator import Mutator, Words
from .base import Target

_DTYPES = (*BITS, "BF16", "BF16", "F32", "F16")
_NAMES = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.experts.gate_up_proj",
    "lm_head.weight",
    "a",
    "b.bias",
)
#: where octavo holds to the letter of the format, and the library does not; or has a bound of its own
_STRICTER = re.compile(
    r"appears twice"  # the library takes the last of two tensors of one name
    r"|must have exactly dtype, shape and data_offsets"  # it passes over other keys, and takes lists for objects
    r"|does not start with '\{'"  # it passes over blanks
    r"|__metadata__ must map strings to strings"  # it takes null for none
    r"|unknown dtype"  # it takes {"U8": null} for "U8"
    r"|may (have|be of) at most"  # bounds of names and axes
    r"|of 63 bits|63 bits can count"  # torch's; the library counts in 64
    r"|reads tensors of at most"
)


class Headers(Target):
    """A whole file: the header's length, the header, data."""

    name = "headers"
    share = 30
    #: how many of the headers are new ones, not changed ones
    new = 0.5
    words = Words(
        keys=("dtype", "shape", "data_offsets", "__metadata__", "format", *_NAMES),
        texts=(*BITS, *_NAMES, "pt", "F8_E4M3FN", "f32", "BF16 ", "__metadata__"),
        numbers=("8", "12", "16", "24", "100000000"),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.file = folder / "model.safetensors"

    def run(self, data: bytes) -> None:
        self.file.write_bytes(data)
        try:
            theirs: Any = {
                name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
                for name, tensor in safetensors.deserialize(data)
            }
        except Exception as error:
            theirs = error
        try:
            checkpoint = Checkpoint.open(self.file)
        except OctavoError as error:
            if not isinstance(theirs, Exception) and not _STRICTER.search(str(error)):
                raise AssertionError(f"safetensors opens what octavo refuses: {error}") from error
            raise
        assert not isinstance(theirs, Exception), f"octavo opens what safetensors refuses: {theirs}"
        mine = {
            name: (info.dtype_name, info.shape, data[info.offset : info.offset + info.nbytes])
            for name, info in checkpoint.tensors.items()
        }
        assert mine == theirs, f"octavo and safetensors read different tensors: {mine} {theirs}"
        plan = octavo.plan(self.file, model=False)
        plan.to_dict()
        if zlib.crc32(data) % 16 == 0:  # these cost more
            plan.table()
            dict(octavo.stream(self.file, threads=1))

    # -- inputs -------------------------------------------------------------------------------------------------------

    def mutated(self, data: bytes, random: Random) -> bytes:
        mutator = Mutator(random, self.words)
        tree = self._new_header(mutator) if random.random() < self.new else _header_of(data)
        if tree is None or random.random() < 0.05:
            return mutator.damaged(data)
        if random.random() < 0.85:
            tree = mutator.tree(tree)
        if random.random() < 0.5:
            _fit_offsets(tree, sizes=random.random() < 0.7)
        header = encode(tree, random.random() < 0.7)
        if random.random() < 0.1:
            header = mutator.damaged(header)
        if random.random() < 0.1:
            header += b" " * (-len(header) % 8)
        length = len(header)
        if random.random() < 0.08:
            length = random.choice((0, 1, length - 1, length + 1, length + 8, 10**8, 10**8 + 1, 2**63, 2**64 - 1))
        held = _declared_end(tree)
        if random.random() < 0.1:
            held += random.choice((-1, 1, 8, -held, 100))
        return struct.pack("<Q", length % 2**64) + header + self.content(data, max(0, min(held, 5000)))

    def content(self, data: bytes, nbytes: int) -> bytes:
        """What follows the header, so that each byte tells where it is."""
        return bytes(i * 7 % 251 for i in range(nbytes))

    def _new_header(self, mutator: Mutator) -> Object:
        """A sound header of a few small tensors."""
        random = mutator.random
        tree = Object()
        if random.random() < 0.3:
            tree.append(["__metadata__", Object([["format", "pt"]])])
        for number in range(random.randint(0, 6)):
            name = mutator.text() if random.random() < 0.3 else f"model.layers.{number}.q_proj.weight"
            axes = random.choice((0, 1, 2, 2, 2, 3, 3, 4, 8, 70))
            shape = [
                Raw(str(random.choice((0, 1, 2, 3, 4, 8) if axes < 5 else (1, 1, 1, 1, 2, 0)))) for _ in range(axes)
            ]
            entry = [["dtype", random.choice(_DTYPES)], ["shape", shape], ["data_offsets", [Raw("0"), Raw("0")]]]
            tree.append([name, Object(entry)])
        _fit_offsets(tree, sizes=True)
        if random.random() < 0.3:
            random.shuffle(tree)
        return tree


def _header_of(data: bytes) -> Any:
    try:
        tree = parse(data[8 : 8 + int.from_bytes(data[:8], "little")].decode("utf-8", "surrogatepass"))
    except ValueError:
        return None
    return tree if isinstance(tree, Object) else None


def _entries(tree: Any) -> list[Object]:
    """Those of a header that look like tensors."""
    values = [pair[1] for pair in tree if pair[0] != "__metadata__"] if isinstance(tree, Object) else []
    return [value for value in values if isinstance(value, Object)]


def _natural(value: Any) -> int:
    return int(value) if isinstance(value, Raw) and value.isdecimal() and len(value) < 30 else 0


def _fit_offsets(tree: Any, sizes: bool) -> None:
    """Lay the tensors out one after another; of the sizes that their shapes say, or of those that they claim."""
    end = 0
    for entry in _entries(tree):
        offsets, shape, dtype = entry.get("data_offsets"), entry.get("shape"), entry.get("dtype")
        if not isinstance(offsets, list) or isinstance(offsets, Object) or len(offsets) != 2:
            continue
        nbytes = max(0, _natural(offsets[1]) - _natural(offsets[0]))
        if sizes and isinstance(shape, list) and isinstance(dtype, str):
            bits = BITS.get(dtype, 8)
            for axis in itertools.islice(shape, 5000):
                bits = min(bits * _natural(axis), 1 << 80)
            nbytes = bits // 8
        offsets[:] = [Raw(str(end)), Raw(str(end + nbytes))]
        end += nbytes


def _declared_end(tree: Any) -> int:
    ends = [0]
    for entry in _entries(tree):
        offsets = entry.get("data_offsets")
        ends += [_natural(offsets[-1])] if isinstance(offsets, list) and offsets else []
    return max(ends)
