"""Digests: those of zlib, whatever pieces the bytes come in, from however many threads."""

from __future__ import annotations

import itertools
import random
import threading
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.checkpoint.digests import Digest


def of(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=12), st.randoms(use_true_random=False))
def test_pieces_in_any_order_give_the_digest_of_the_whole(data: bytes, cuts: list[int], order: random.Random) -> None:
    bounds = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = list(itertools.pairwise(bounds))
    order.shuffle(pieces)
    digest = Digest(len(data))
    for start, stop in pieces:
        assert not digest.complete
        digest.add(start, memoryview(data)[start:stop])
    assert digest.complete
    assert digest.value == of(data)


@given(st.binary(min_size=1, max_size=100), st.lists(st.tuples(st.integers(0, 99), st.integers(1, 99)), max_size=20))
def test_bytes_that_come_again_count_once(data: bytes, spans: list[tuple[int, int]]) -> None:
    digest = Digest(len(data))
    came: set[int] = set()
    for start, length in spans:
        start = min(start, len(data))
        stop = min(start + length, len(data))
        digest.add(start, memoryview(data)[start:stop])
        came |= set(range(start, stop))
        gaps = digest.gaps()
        assert {at for gap in gaps for at in range(*gap)} == set(range(len(data))) - came
        assert all(a < b for a, b in gaps)
    for start, stop in digest.gaps():
        digest.add(start, memoryview(data)[start:stop])
    assert digest.value == of(data)


@pytest.mark.parametrize("nbytes", [0, 1, 7, 4096, 1_000_003])
def test_a_digest_is_that_of_zlib(nbytes: int) -> None:
    data = random.Random(nbytes).randbytes(nbytes)
    digest = Digest(nbytes)
    digest.add(0, memoryview(data))
    assert digest.value == of(data)


def test_threads_may_bring_pieces_and_bring_them_twice() -> None:
    data = random.Random(0).randbytes(3_000_000)
    digest = Digest(len(data))

    def bring(seed: int) -> None:
        starts = list(range(0, len(data), 77_777))
        random.Random(seed).shuffle(starts)
        for start in starts:
            digest.add(start, memoryview(data)[start : start + 100_000])

    threads = [threading.Thread(target=bring, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digest.value == of(data)


def test_a_flipped_bit_anywhere_is_told() -> None:
    data = bytearray(random.Random(1).randbytes(60))
    whole = of(bytes(data))
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        digest = Digest(len(data))
        digest.add(20, memoryview(data)[20:])
        digest.add(0, memoryview(data)[:20])
        assert digest.value != whole
        data[bit // 8] ^= 1 << bit % 8
