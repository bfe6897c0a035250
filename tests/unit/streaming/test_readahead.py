"""Reading ahead: into the page cache, as far as there is room, and never in the way of the load."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest

from octavo.checkpoint.files import Identity
from octavo.checkpoint.header import Shard
from octavo.streaming import readahead as ahead
from octavo.streaming.files import cached_share
from octavo.streaming.readahead import ReadAhead

pytestmark = [pytest.mark.usefixtures("nothing_left_behind"), pytest.mark.timeout(30)]

MIB = 1 << 20


def cold_shard(folder: Path, name: str, size: int) -> Shard:
    """A file that the page cache does not hold."""
    path = folder / name
    path.write_bytes(os.urandom(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        for _ in range(20):  # what a core has just put there, a busy system may forget later than asked
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if cached_share(path) == 0:
                return Shard(path, Identity.of(path.stat()))
            time.sleep(0.01)
    pytest.skip("the page cache can't be made to forget files here")


def read_all(reading: ReadAhead, expected: int) -> None:
    with reading:
        reading._ring.wait_for(lambda: not reading._ring.running)
    # of the last part of a file, the kernel may have read on from the one before
    assert expected - MIB <= reading.read_bytes <= expected


def test_what_is_not_cached_is_read_in_the_order_of_the_files(tmp_path):
    shards = [cold_shard(tmp_path, name, 20 * MIB + 5) for name in ("a.safetensors", "b.safetensors")]
    read_all(ReadAhead(shards), 2 * (20 * MIB + 5))
    assert [cached_share(shard.path) for shard in shards] == [1, 1]
    read_all(ReadAhead(shards), 0)  # it is there


def test_no_more_is_read_than_there_is_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "available_bytes", lambda: 60 * MIB)
    shards = [cold_shard(tmp_path, name, 20 * MIB) for name in ("a.safetensors", "b.safetensors")]
    read_all(ReadAhead(shards), 28 * MIB)  # the third window of the first, and one of the second
    assert cached_share(shards[0].path) == 1
    assert 0.4 <= cached_share(shards[1].path) < 1  # the kernel reads on by a little


def test_processes_that_read_the_same_files_begin_at_different_places(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "available_bytes", lambda: 64 * MIB)
    shards = [cold_shard(tmp_path, name, 32 * MIB) for name in ("a.safetensors", "b.safetensors")]
    read_all(ReadAhead(shards, 0.5), 32 * MIB)
    assert [cached_share(shard.path) for shard in shards] == [0, 1]
    read_all(ReadAhead(shards, 0.5), 32 * MIB)  # then what is before
    assert [cached_share(shard.path) for shard in shards] == [1, 1]


@pytest.mark.parametrize("trouble", ["gone", "a folder", "shorter"])
def test_trouble_is_left_for_the_stream_to_report(trouble, tmp_path):
    first, second = [cold_shard(tmp_path, name, 9 * MIB) for name in ("a.safetensors", "b.safetensors")]
    if trouble == "shorter":
        os.truncate(first.path, 5)
    else:
        first.path.unlink()
        if trouble == "a folder":
            first.path.mkdir()
    read_all(ReadAhead([first, second]), 9 * MIB)


def test_it_ends_when_it_is_left(tmp_path):
    shard = cold_shard(tmp_path, "a.safetensors", 64 * MIB)
    with pytest.raises(KeyboardInterrupt), ReadAhead([shard]) as reading:
        raise KeyboardInterrupt
    assert not reading._ring.running


def test_what_is_cached_of_a_file_is_not_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "available_bytes", lambda: 80 * MIB)
    shard = cold_shard(tmp_path, "a.safetensors", 64 * MIB)
    with shard.path.open("rb") as file:
        file.read(32 * MIB)
    reading = ReadAhead([shard])
    with reading:
        reading._ring.wait_for(lambda: not reading._ring.running)
    assert 16 * MIB <= reading.read_bytes <= 32 * MIB  # the kernel may have read on by a few MiB
    assert cached_share(shard.path) > 0.9


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyboardInterrupt()])
def test_threads_that_can_t_be_started_leave_none_behind(error, tmp_path, monkeypatch):
    shard, entered = cold_shard(tmp_path, "a.safetensors", MIB), []

    def start(thread: threading.Thread) -> None:
        if thread.name == "octavo-1":
            raise error
        original(thread)

    original = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with contextlib.suppress(KeyboardInterrupt), ReadAhead([shard]):
        entered.append(True)
    assert bool(entered) == isinstance(error, Exception)  # a load goes on without it, but for Ctrl-C


@pytest.mark.parametrize("place", ["available_bytes", "cached_share"])
def test_it_never_fails_and_hides_no_error_of_the_load(place, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    shard = cold_shard(tmp_path, "a.safetensors", MIB)
    monkeypatch.setattr(ahead, place, fail)
    with ReadAhead([shard]):
        pass
    with pytest.raises(ValueError, match="of the load"), ReadAhead([shard]):
        raise ValueError("of the load")
