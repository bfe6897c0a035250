"""What benchmarks of engines share: numbers of GPUs, converted checkpoints, answers to compare, time that is left."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import Merged, run_fresh, say

from octavo.adapters.engine.names import FORMATS

CONVERT = """
import octavo
source, target, scheme, form = sys.argv[1:]
began = time.perf_counter()
octavo.convert(source, target, scheme, progress=False, prove=False, **({"format": form} if form else {}))
result(seconds=time.perf_counter() - began)
"""

#: schemes in a format that is not the engines' default: what they are called here -> scheme, format
OTHER_FORMATS = {"int8_channel_w8a16": ("int8_channel", "compressed-tensors")}


def scheme_options(name: str) -> dict[str, str]:
    """What octavo in an engine is given for a scheme, as it is called here."""
    scheme, form = OTHER_FORMATS.get(name, (name, None))
    return {"scheme": scheme} | ({"format": form} if form else {})


class Ranks(NamedTuple):
    """How many GPUs work together, and whether each has whole experts."""

    count: int
    experts: bool = False

    def __str__(self) -> str:
        return f"tp{self.count}{' ep' if self.experts else ''}"

    @classmethod
    def parse(cls, text: str) -> Ranks:
        return cls(int(text.removesuffix("e")), text.endswith("e"))


#: what a row is called that is of a second start
AGAIN = " again"


def starts(args: argparse.Namespace, octavo: Sequence[str]) -> list[tuple[str, Ranks, bool]]:
    """Ways, on how many GPUs, and whether it is for the second time, which ``octavo``'s are asked for."""
    return [
        (way, ranks, again)
        for ranks in args.tensor_parallel
        for way in args.ways
        for again in ([False, True] if args.again and way in octavo else [False])
    ]


class Budget:
    """Seconds that may pass; what would not end by then is not begun.

    Args:
        least_s: that a process takes, as long as none has.
    """

    def __init__(self, seconds: float | None, timeout_s: float, least_s: float = 0) -> None:
        self._ends = time.perf_counter() + seconds if seconds else math.inf
        self._timeout_s, self._least_s, self._longest_s = timeout_s, least_s, 0.0

    def timeout_s(self) -> float | None:
        """How long the next process may take; None if it should not begin."""
        left = self._ends - time.perf_counter()
        return min(self._timeout_s, left) if left > self._needed_s else None

    @property
    def _needed_s(self) -> float:
        return 1.1 * self._longest_s or self._least_s

    def why(self) -> str:
        """Why the next process should not begin."""
        left = max(0.0, self._ends - time.perf_counter())
        return f"not started: {left:.0f} s are left, and {self._needed_s:.0f} s are needed"

    def took(self, seconds: float) -> None:
        self._longest_s = max(self._longest_s, seconds)


def source_of(way: str, folder: Path, merged: Merged, timeout_s: float) -> Path:
    """The checkpoint that a way reads; converted first, where it is to be."""
    kind, _, scheme = way.partition("-")
    if kind != "converted":
        return folder
    target = folder.with_name(f"{folder.name}-{scheme}")
    if not target.is_dir():
        name, form = OTHER_FORMATS.get(scheme, (scheme, FORMATS.get(scheme, "")))
        found = run_fresh(CONVERT, folder, target, name, form, timeout_s=timeout_s)
        say(f"converted to {scheme}: {found['seconds']:.1f} s")
        merged.add(found, "models", folder.name, f"convert-{scheme}")
    return target


def add_arguments(parser: argparse.ArgumentParser, ways: Sequence[str], default: Sequence[str]) -> None:
    """Which ways, on how many GPUs, what is asked, and how long it may take."""
    parser.add_argument("--ways", nargs="+", default=default, choices=ways, metavar="WAY", help=", ".join(ways))
    parser.add_argument(
        "--tensor-parallel",
        nargs="+",
        type=Ranks.parse,
        default=[Ranks(1)],
        metavar="N",
        help="GPUs; 2e: experts apart",
    )
    parser.add_argument("--compare", type=_pair, default=(8, 128), metavar="COUNTxLENGTH", help="prompts (%(default)s)")
    parser.add_argument("--prefill", type=_pair, default=(4, 2048), metavar="COUNTxLENGTH", help="(%(default)s)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32], help="of the decode (%(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the decode (%(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens to decode (%(default)s)")
    parser.add_argument("--again", action="store_true", help="octavo's ways a second time, with what they remember")
    parser.add_argument("--load-only", action="store_true", help="time the load, not the answers")
    parser.add_argument("--cold", action="store_true", help="from the disk, not from the page cache")
    parser.add_argument("--sums", action="store_true", help="compare all parameters, too")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="more options for the engine")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu tries it out (%(default)s)")
    parser.add_argument("--timeout-s", type=float, default=240, help="for one process (%(default)s)")
    parser.add_argument("--budget-s", type=float, help="start nothing that would not end by then")
    parser.add_argument("--log", action="store_true", help="print what the engines print")


def _pair(text: str) -> tuple[int, int]:
    count, _, length = text.partition("x")
    return int(count), int(length)


def what_is_asked(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the measured side that all engines have."""
    names = ("device", "compare", "prefill", "batches", "prompt", "new", "sums", "engine")
    return {**{name: getattr(args, name) for name in names}, "speed": not args.load_only}


# -- engines ----------------------------------------------------------------------------------------------------------


def plugin_path(folder: Path, group: str, *entries: str) -> Path:
    """A folder for PYTHONPATH from which an engine knows plugins, where octavo runs from its sources uninstalled."""
    made = folder / "plugin"
    info = made / "octavo-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: octavo\nVersion: 0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries, ""]))
    return made


def plugin_is_known(group: str) -> bool:
    """Whether an engine finds octavo's plugin by itself."""
    return any(found.name == "octavo" for found in importlib.metadata.entry_points(group=group))


def random_ids(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random token ids, the same in every process."""
    numbers = random.Random(count * 1_000_003 + length)
    return [[numbers.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]


# -- speed ------------------------------------------------------------------------------------------------------------


def prefill_rate(seconds_of: Callable[[int], float], tokens: int, repeats: int = 5) -> dict[str, Any]:
    """Tokens a second of prompts, by the seconds that an answer of so many tokens takes: one token each."""
    first_s = seconds_of(1)  # compiles kernels
    seconds = min(seconds_of(1) for _ in range(repeats))
    return {"tokens": tokens, "first_s": first_s, "seconds": seconds, "tokens_per_s": tokens / seconds}


def decode_rate(seconds_of: Callable[[int], float], batch: int, new: int, repeats: int = 5) -> dict[str, Any]:
    """New tokens a second after the first, of a batch: what answering takes beyond one token each."""
    first_s = seconds_of(new)
    seconds = min(seconds_of(new) for _ in range(repeats))
    seconds -= min(seconds_of(1) for _ in range(repeats))
    return {"first_s": first_s, "seconds": seconds, "tokens_per_s": batch * (new - 1) / seconds}


# -- answers ----------------------------------------------------------------------------------------------------------


def compare(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two sets of answers: how far the logprobs of the same prompts are from each other, and how many tokens agree."""
    a, b = ([value for prompt in answers["logprobs"] for value in prompt] for answers in (mine, other))
    tokens = [
        (x, y) for xs, ys in zip(mine["tokens"], other["tokens"], strict=True) for x, y in zip(xs, ys, strict=True)
    ]
    firsts = [(xs[0], ys[0]) for xs, ys in zip(mine["tokens"], other["tokens"], strict=True)]
    return {
        "mean_difference": round(statistics.fmean(abs(x - y) for x, y in zip(a, b, strict=True)), 5),
        "correlation": round(statistics.correlation(a, b), 5),
        "same_tokens": round(statistics.fmean(x == y for x, y in tokens), 4),
        "same_first_tokens": round(statistics.fmean(x == y for x, y in firsts), 4),
        "equal": mine["logprobs"] == other["logprobs"] and mine["tokens"] == other["tokens"],
        "equal_parameters": mine["sums"] == other["sums"] if mine["sums"] and other["sums"] else None,
    }


def against(way: str, ranks: Ranks, ways: Iterable[str], folder: Path, engine: str = "vllm") -> dict[str, Any]:
    """Comparisons with the other ways that there are, on as many GPUs; with more than one, with the same way on one."""
    path = answers_path(way, ranks, folder, engine)
    if not path.is_file():  # a second start went wrong
        return {}
    mine = json.loads(path.read_text())
    others = [(other, ranks) for other in ways if other != way]
    found = {}
    for other, count in [*others, *([(way, Ranks(1))] if ranks.count > 1 else [])]:
        path = answers_path(other, count, folder, engine)
        theirs = json.loads(path.read_text()) if path.is_file() else None
        if theirs is not None and lengths(theirs) == lengths(mine):  # asked the same
            found[key_of(other, count) if count != ranks else other] = compare(mine, theirs)
    return found


def lengths(answers: dict[str, Any]) -> list[list[int]]:
    return [[len(values) for values in answers[what]] for what in ("tokens", "logprobs")]


def answers_path(way: str, ranks: Ranks, folder: Path, engine: str = "vllm") -> Path:
    name = key_of(way, ranks).replace(" ", "-")
    return folder.with_name(f"{folder.name}.{engine}-answers") / f"{name}.json"


def key_of(way: str, ranks: Ranks) -> str:
    return f"{way} {ranks}"
