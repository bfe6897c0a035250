"""Files: read through the page cache or past it, closed, and never misread."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import open_shards
from helpers.properties import examples
from octavo.checkpoint.files import Identity
from octavo.checkpoint.header import Shard, TensorInfo
from octavo.errors import CheckpointError, SourceChangedError
from octavo.machine import PAGE
from octavo.streaming.files import Files, cached_share

pytestmark = [pytest.mark.usefixtures("nothing_left_behind"), pytest.mark.timeout(30)]


def shard(tmp_path: Path, name: str = "a.safetensors", size: int = 1000) -> Shard:
    path = tmp_path / name
    path.write_bytes(bytes(i % 251 for i in range(size)))
    return Shard(path, Identity.of(path.stat()))


def read(files: Files, shard: int, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    files.read_into(shard, memoryview(buffer), offset)
    return bytes(buffer)


def test_files_are_opened_when_needed_and_closed(tmp_path):
    files = Files([shard(tmp_path), shard(tmp_path, "b.safetensors")])
    assert open_shards() == []
    assert read(files, 1, 300, 50) == bytes(i % 251 for i in range(300, 350))
    read(files, 1, 0, 1000)
    assert open_shards() == [str(tmp_path / "b.safetensors")]
    files.close()
    assert open_shards() == []
    files.close()


def test_closed_files_are_not_opened_again(tmp_path):
    files = Files([shard(tmp_path)])
    files.close()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: is read no more"):
        read(files, 0, 0, 10)
    assert open_shards() == []


def test_a_file_that_ends_early_is_an_error_that_says_where(tmp_path):
    mine = shard(tmp_path)
    files = Files([mine])
    read(files, 0, 0, 1)
    os.truncate(mine.path, 400)
    with pytest.raises(SourceChangedError, match=r"a.safetensors: ended at byte 400 while being read"):
        read(files, 0, 390, 50)
    files.close()


def test_errors_name_the_tensor_and_its_bytes(tmp_path, monkeypatch):
    mine = shard(tmp_path)
    tensors = [TensorInfo(name, "U8", (n,), 0, at, n) for name, at, n in (("a", 100, 250), ("b", 350, 650))]
    files = Files([mine], tensors=tensors)
    read(files, 0, 0, 1)
    os.truncate(mine.path, 400)
    with pytest.raises(SourceChangedError) as caught:
        read(files, 0, 300, 500)
    assert "ended at byte 400 while being read (tensor 'b': bytes 350 to 1,000); it was 1,000 bytes" in str(
        caught.value
    )

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"reading 10 bytes at 110 \(tensor 'a': bytes 100 to 350\) failed: Inp"):
        read(files, 0, 110, 10)
    files.close()


def test_a_file_that_changed_before_it_was_read_is_an_error(tmp_path):
    mine = shard(tmp_path)
    mine.path.write_bytes(b"x" * 1001)
    with pytest.raises(SourceChangedError, match="changed since it was opened \\(1,000 bytes then, 1,001 now\\)"):
        read(Files([mine]), 0, 0, 10)


def test_a_file_that_disappeared_is_an_error(tmp_path):
    mine = shard(tmp_path)
    mine.path.unlink()
    with pytest.raises(SourceChangedError, match="can't be read any more: No such file"):
        read(Files([mine]), 0, 0, 10)


def test_a_file_that_changed_after_it_was_read_is_an_error(tmp_path):
    mine, other = shard(tmp_path), shard(tmp_path, "b.safetensors")
    files = Files([mine, other])
    read(files, 0, 0, 10)
    os.utime(other.path, ns=(0, 0))
    files.check_unchanged()  # never read: not this stream's business
    os.utime(mine.path, ns=(0, 0))
    with pytest.raises(SourceChangedError, match=r"a\.safetensors"):
        files.check_unchanged()
    files.close()


def test_a_failing_read_names_the_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    files = Files([shard(tmp_path)])
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"a.safetensors: reading 10 bytes at 7 failed: .*error: the disk"):
        read(files, 0, 7, 10)
    files.close()


def test_a_short_read_is_continued(tmp_path, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:3]], offset))
    files = Files([shard(tmp_path)])
    assert read(files, 0, 100, 50) == bytes(i % 251 for i in range(100, 150))
    files.close()


# -- past the page cache ----------------------------------------------------------------------------------------------

SIZE = 10 * PAGE + 123


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Shard:
    made = shard(tmp_path_factory.mktemp("large"), size=SIZE)
    try:
        os.close(os.open(made.path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct I/O")
    return made


@examples(60)
@given(offset=st.integers(0, SIZE), length=st.integers(0, SIZE), direct_io=st.sampled_from([True, False, None]))
def test_a_run_is_read_whatever_its_alignment(large, offset, length, direct_io):
    length = min(length, SIZE - offset)
    memory = mmap.mmap(-1, 13 * PAGE)  # page-aligned
    files = Files([large], direct_io)
    start = files.read_run(0, memoryview(memory), offset, length)
    files.close()
    assert memory[start : start + length] == large.path.read_bytes()[offset : offset + length]
    if direct_io and length:
        assert start == offset % PAGE  # past the cache


def test_where_alignment_has_no_room_the_cache_is_read(large):
    memory = mmap.mmap(-1, PAGE)
    files = Files([large], True)
    assert files.read_run(0, memoryview(memory), PAGE - 5, 10) == 0
    files.close()
    assert memory[:10] == large.path.read_bytes()[PAGE - 5 : PAGE + 5]


def test_a_file_that_ends_early_is_an_error_past_the_cache_too(large, tmp_path):
    short = shard(tmp_path, size=3 * PAGE)
    files = Files([short], True)
    memory = mmap.mmap(-1, 8 * PAGE)
    with pytest.raises(SourceChangedError, match=f"ended at byte {3 * PAGE:,} while being read"):
        files.read_run(0, memoryview(memory), PAGE, 4 * PAGE)
    files.close()


def test_what_the_page_cache_holds_is_told(tmp_path):
    path = tmp_path / "some"
    path.write_bytes(bytes(8 << 20))
    path.read_bytes()
    assert cached_share(path) == 1.0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(path) == 1.0:
        pytest.skip("this file system is in memory")
    assert cached_share(path) < 0.1


def test_of_a_file_that_is_cached_in_part_the_rest_is_read_past_the_cache(tmp_path):
    size, cached, length = 48 << 20, 4 << 20, 1 << 20  # the kernel reads on by a few MiB
    mine, memory = shard(tmp_path, size=size), mmap.mmap(-1, length + 2 * PAGE)
    content = mine.path.read_bytes()
    with mine.path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.pread(file.fileno(), cached, 0)
    if cached_share(mine.path) > 0.9:
        pytest.skip("this file system is in memory")
    files = Files([mine], None)
    found = {}
    for offset in (size // 2 + 7, size - length + 7, 7, cached - length + 7):
        wanted = content[offset : offset + length]
        start = files.read_run(0, memoryview(memory), offset, len(wanted))
        assert memory[start : start + len(wanted)] == wanted
        found[offset] = (start, cached_share(mine.path, offset, len(wanted)))
    files.close()
    *past, (first, _), (second, _) = found.values()
    assert past == [(7, 0.0), (7, 0.0)]  # not from the cache, and not into it
    assert (first, second) == (0, 0)  # from it


def test_direct_reads_that_are_impossible_are_an_error_where_they_were_asked_for(tmp_path, monkeypatch):
    def no_direct(path, flags, *args):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return opened(path, flags, *args)

    opened = os.open
    monkeypatch.setattr(os, "open", no_direct)
    mine, memory = shard(tmp_path), mmap.mmap(-1, PAGE)
    forced = Files([mine], True)
    for _ in range(2):  # whoever comes second hears the same
        with pytest.raises(CheckpointError, match=r"a\.safetensors: can't be opened for direct I/O .*direct_io=None"):
            forced.read_run(0, memoryview(memory), 0, 100)
    forced.close()
    free = Files([mine], None)
    assert free.read_run(0, memoryview(memory), 7, 100) == 0
    free.close()
    assert memory[:100] == mine.path.read_bytes()[7:107]
