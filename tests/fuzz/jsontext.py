"""JSON as a tree that keeps what `json` would lose: the order and repetition of keys, and numbers as they are written.

Object      a list of [key, value] lists
list        an array
str         a string, which may hold surrogates
Raw         text that is written as it stands: numbers, constants, and what is no JSON at all
"""

from __future__ import annotations

import json
import re
from typing import Any


class Object(list[Any]):
    """The pairs of a JSON object, each a list of key and value."""

    def get(self, key: str) -> Any:
        """The last value of a key, as most readers understand it; None if there is none."""
        return next((pair[1] for pair in reversed(self) if pair[0] == key), None)

    def set(self, key: str, value: Any) -> None:
        """Change the last value of a key, or append it."""
        for pair in reversed(self):
            if pair[0] == key:
                pair[1] = value
                return
        self.append([key, value])


class Raw(str):
    """Text that `dumps` copies."""

    __slots__ = ()


#: a deeper tree is not taken apart, but changed as text
_MOST_DEEP = 60


def parse(text: str) -> Any:
    """The tree of a JSON text; a ValueError where there is none."""
    if _depth(text) > _MOST_DEEP:
        raise ValueError("too deep")
    return json.loads(
        text,
        object_pairs_hook=lambda pairs: Object(map(list, pairs)),
        parse_int=Raw,
        parse_float=Raw,
        parse_constant=Raw,
    )


def tree_of(value: Any) -> Any:
    """Python's dicts, lists, texts and numbers as a tree."""
    return parse(json.dumps(value))


def dumps(tree: Any, ascii_only: bool = True) -> str:
    """The text of a tree."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Object):
        # an edited key may be of any kind; what is no text is written as what it is
        return "{" + ",".join(f"{dumps(key, ascii_only)}:{dumps(value, ascii_only)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(dumps(value, ascii_only) for value in tree) + "]"
    return json.dumps(tree, ensure_ascii=ascii_only)


def encode(tree: Any, ascii_only: bool = True) -> bytes:
    """The bytes of a tree, surrogates included."""
    return dumps(tree, ascii_only).encode("utf-8", "surrogatepass")


def copied(tree: Any) -> Any:
    """A copy whose parts can be changed without changing the original's."""
    if isinstance(tree, Object):
        return Object([copied(key), copied(value)] for key, value in tree)
    if isinstance(tree, list):
        return [copied(value) for value in tree]
    return tree


def _depth(text: str) -> int:
    """How many brackets are open at once, at most; those in texts count, too."""
    deepest = depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest
