"""A structure-aware mutator: changes to a JSON tree, to a text, or to bytes, chosen by a seeded `random.Random`.

A target gives the words of its grammar (`Words`) and repairs what must fit together, so that most inputs get past the
first check and fail at a later one, or not at all. Nothing here knows octavo.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from .jsontext import Object, Raw, copied, encode, parse

#: inputs are cut to this size, but for the few that are meant to be large
MAX_BYTES = 1 << 14
_LARGE_BYTES = 1 << 18

NUMBERS = (
    *("0", "1", "2", "3", "7", "128", "-1", "-0", "0.0", "1.0", "0.5", "-0.0", "1e2", "1E400", "-1e999", "NaN"),
    *("Infinity", "-Infinity", "127", "255", "256", "65535", "2147483647", "2147483648", "4294967295", "4294967296"),
    *("9007199254740993", "9223372036854775807", "9223372036854775808", "18446744073709551615"),
    *("18446744073709551616", "-9223372036854775809", "99999999999", "01", "0x10", "1_000", "+1", ".5", "1."),
)
FRAGMENTS = (
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "../",
        "./",
        "\\",
        "~",
        "-",
        "*",
        "?",
        "[",
        "]",
        "**",
        "re:",
        ".weight",
        ".bias",
        ":",
        "%s",
    ),
    *(
        "{}",
        "\x00",
        "\n",
        "\r",
        "\t",
        "\x1b[31m",
        "\x1b]0;x\x07",
        "\x7f",
        "\x85",
        "\x9b31m",
        "\u2028",
        "\u202e",
        "\ufeff",
    ),
    *(
        "\ud800",
        "\udfff",
        "\udc80",
        "\uffff",
        "é",
        "e\u0301",
        "ß",
        "İ",
        "\U0001f600",
        "١",
        "[red]",
        "[/b]",
        "[/]",
        "$",
        "(",
    ),
    *(
        ")",
        "{1,99999999999}",
        "(?P<n>",
        "(?i)",
        "\\d",
        "|",
        "^",
        "None",
        "true",
        "0",
        "9" * 20,
        "model",
        "norm",
        "layers",
    ),
)
_BYTES = (
    *(
        b"",
        b"\x00",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b",",
        b":",
        b"\\",
    ),
    *(b"\\u", b"\\ud800", b"/*", b"//", b"NaN", b"null", b"\n", b" ", b"\t", b"\x1f", b"'", b"-", b"e9999", b"0", b"."),
)
_LENGTHS = (1, 2, 10, 70, 255, 256, 300, 1100, 5000)


@dataclass(frozen=True)
class Words:
    """What a grammar is made of."""

    keys: Sequence[str] = ()
    texts: Sequence[str] = ()
    numbers: Sequence[str] = ()


class Mutator:
    """Changes of inputs, all by one source of chance."""

    def __init__(self, random: Random, words: Words) -> None:
        self.random, self.words = random, words

    # -- whole inputs -------------------------------------------------------------------------------------------------

    def document(self, data: bytes, repair: Callable[[Any], Any] = lambda tree: tree) -> bytes:
        """A JSON document, changed: mostly as a tree, which ``repair`` may complete; else as bytes."""
        random = self.random
        if random.random() < 0.9:
            try:
                tree = parse(data.decode("utf-8", "surrogatepass"))
            except ValueError:
                return self.damaged(data)
            data = encode(repair(self.tree(tree)), random.random() < 0.7)
        if random.random() < 0.12:
            data = self.damaged(data)
        return data[: _LARGE_BYTES if random.random() < 0.02 else MAX_BYTES]

    def tree(self, tree: Any) -> Any:
        """A tree after a few changes."""
        box = [tree]
        for _ in range(1 + int(self.random.expovariate(1.2))):
            self._change(box)
        return box[0]

    def damaged(self, data: bytes) -> bytes:
        """Bytes after a change that knows no grammar."""
        random, length = self.random, len(data)
        a, b = sorted((random.randint(0, length), random.randint(0, length)))
        if random.random() < 0.7:
            b = min(b, a + 4)
        token = random.choice(_BYTES)
        choice = random.randrange(7)
        if choice == 0:
            return data[:a]
        if choice == 1:
            return data[:a] + data[b:]
        if choice == 2:
            return data[:a] + token + data[a:]
        if choice == 3:
            return data[:a] + token + data[b:]
        if choice == 4:
            return data[:b] + data[a:b] * random.randint(1, 8) + data[b:]
        if choice == 5 and a < length:
            return data[:a] + bytes([data[a] ^ (1 << random.randrange(8))]) + data[a + 1 :]
        return data + token * random.randint(1, 16)

    # -- values -------------------------------------------------------------------------------------------------------

    def value(self) -> Any:
        """Any JSON value, or nearly one."""
        random = self.random
        choice = random.randrange(10)
        if choice < 3:
            return self.number()
        if choice < 7:
            return self.text()
        if choice == 7:
            return random.choice((None, True, False, [], Object()))
        if choice == 8:
            return [self.number() for _ in range(random.randint(0, 3))]
        return self._odd()

    def number(self) -> Raw:
        """A number, mostly one at which something changes."""
        random = self.random
        if self.words.numbers and random.random() < 0.4:
            return Raw(random.choice(self.words.numbers))
        if random.random() < 0.05:
            return Raw("9" * random.choice((25, 400, 4299, 4301, 12000)))
        return Raw(random.choice(NUMBERS)) if random.random() < 0.6 else Raw(str(random.randint(0, 300)))

    def text(self, base: str | None = None) -> str:
        """A text of the grammar, and often one that was edited."""
        random = self.random
        if base is None:
            base = str(random.choice(self.words.texts or self.words.keys or FRAGMENTS))
            if random.random() < 0.4:
                return base
        a, b = sorted((random.randint(0, len(base)), random.randint(0, len(base))))
        fragment = str(random.choice(FRAGMENTS if random.random() < 0.7 else (self.words.texts or FRAGMENTS)))
        choice = random.randrange(6)
        if choice == 0:
            return base[:a] + base[b:]
        if choice == 1:
            return base[:a] + fragment + base[b:]
        if choice == 2:
            return base[:a] + base[a:b].swapcase() + base[b:]
        if choice == 3 and random.random() < 0.3:
            longest = 40_000 if random.random() < 0.03 else random.choice(_LENGTHS)
            return (base[:a] + (fragment or "x") * longest + base[a:])[: longest + len(base)]
        return base[:a] + fragment + base[a:]

    def _odd(self) -> Any:
        random = self.random
        depth = random.choice((2, 5, 50, 500, 990, 3000))
        opening, closing = random.choice((("[", "]"), ('{"a":', "}"), ("[{}, ", "]"), ('{"a":[', "]}")))
        closed = random.random() < 0.9
        return random.choice(
            (
                Raw(opening * depth + "0" + closing * depth * closed),
                Raw("'x'"),
                Raw(""),
                Raw("nul"),
                Raw("/**/0"),
                Raw('"\x01"'),
                Raw('"\\x"'),
                Raw('"\\ud800"'),
                [Raw("0")] * random.choice((1, 2, 64, 65, 300, 2000)),
            )
        )

    # -- changes of a tree --------------------------------------------------------------------------------------------

    def _change(self, box: list[Any]) -> None:
        random = self.random
        slots = list(_slots(box))
        holder, index = random.choice(slots)
        containers = [slot[0][slot[1]] for slot in slots if isinstance(slot[0][slot[1]], list)]
        filled = [container for container in containers if container]
        choice = random.randrange(12)
        if choice < 3:
            holder[index] = self._nudged(holder[index])
        elif choice == 3:
            holder[index] = self.value()
        elif choice == 4 and filled:
            container = random.choice(filled)
            del container[random.randrange(len(container))]
        elif choice == 5 and filled:
            container = random.choice(filled)
            item = container[random.randrange(len(container))]
            copy = [copied(part) for part in item] if isinstance(container, Object) else copied(item)
            container.insert(random.randint(0, len(container)), copy)
        elif choice in (6, 7) and containers:
            self._add(random.choice(containers))
        elif choice == 8:
            other, place = random.choice(slots)
            holder[index] = copied(other[place])
        elif choice == 9:
            other, place = random.choice(slots)
            if not (_within(other[place], holder) or _within(holder[index], other)):
                holder[index], other[place] = other[place], holder[index]
        elif choice == 10:
            holder[index] = [holder[index]] if random.random() < 0.5 else Object([[self._key(), holder[index]]])
        else:
            objects = [container for container in filled if isinstance(container, Object)]
            if objects:
                pair = random.choice(random.choice(objects))
                pair[0] = self._key() if random.random() < 0.6 else self.text(str(pair[0]))

    def _add(self, container: list[Any]) -> None:
        place = self.random.randint(0, len(container))
        container.insert(place, [self._key(), self.value()] if isinstance(container, Object) else self.value())

    def _key(self) -> str:
        return (
            str(self.random.choice(self.words.keys)) if self.words.keys and self.random.random() < 0.8 else self.text()
        )

    def _nudged(self, value: Any) -> Any:
        """Something near a value."""
        random = self.random
        if isinstance(value, Raw):
            if value.isdecimal() and len(value) < 40 and random.random() < 0.7:
                number = int(value)
                return Raw(str(random.choice((number + 1, number - 1, number * 2, -number, number + 8, number // 2))))
            return self.number()
        if isinstance(value, str):
            return self.text(value) if random.random() < 0.7 else self.text()
        if isinstance(value, Object) and value:
            random.shuffle(value)
            return value
        if isinstance(value, list) and value:
            value[random.randrange(len(value))] = self.value()
            return value
        return self.value()


def _slots(container: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """(list, index) of each value of a tree that stands in a box of one."""
    waiting: list[list[Any]] = [container]
    while waiting:
        found = waiting.pop()
        places = [(pair, 1) for pair in found] if isinstance(found, Object) else [(found, i) for i in range(len(found))]
        for holder, index in places[:200]:
            yield holder, index
            if isinstance(holder[index], list):
                waiting.append(holder[index])


def _within(tree: Any, wanted: list[Any]) -> bool:
    """Return True if the list is part of the tree, where exchanging the two would tie a knot."""
    if tree is wanted:
        return True
    return isinstance(tree, list) and any(_within(part, wanted) for part in tree if isinstance(part, list))
