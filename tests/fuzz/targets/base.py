"""What targets have in common, and the small checkpoints that they are built around."""

from __future__ import annotations

import json
import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from ..mutator import Mutator, Words

CORPUS = Path(__file__).parent.parent / "corpus"
INDEX = "model.safetensors.index.json"


class Target(ABC):
    """One reader of octavo's, a folder for the files that it is given, and the grammar of its inputs."""

    name: ClassVar[str]
    #: of how many hundred inputs it gets how many: few where each costs much
    share: ClassVar[int]
    words: ClassVar[Words] = Words()

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seeds: Sequence[bytes] = [file.read_bytes() for file in corpus(self.name)]

    @abstractmethod
    def run(self, data: bytes) -> None:
        """Let octavo read it; an `OctavoError` refuses it, and an AssertionError says that octavo took it wrong."""

    def tidy(self) -> None:  # noqa: B027  (most leave nothing)
        """Remove what an input left behind."""

    def input(self, seed: int, number: int) -> bytes:
        """The input of this number: the same for the same seed, in every process and on every machine."""
        random = Random(f"{seed}:{self.name}:{number}")
        return self.mutated(random.choice(self.seeds), random)

    def mutated(self, data: bytes, random: Random) -> bytes:
        """Another input, made of one."""
        mutator = Mutator(random, self.words)
        return mutator.document(data, lambda tree: self.repaired(tree, random))

    def repaired(self, tree: Any, random: Random) -> Any:
        """The tree with those parts made to fit that an arbitrary change breaks."""
        return tree


def corpus(name: str) -> list[Path]:
    """The committed inputs of a target."""
    return sorted((CORPUS / name).iterdir())


def shard_bytes(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """A sound safetensors file of zeros: name -> (dtype, shape, bytes)."""
    header, end = {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)
