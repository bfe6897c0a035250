"""A file that threads fill in any order, past the page cache where that is possible."""

from __future__ import annotations

import errno
import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from octavo.errors import OutputError
from octavo.streaming.outfile import OutFile, disk_error


def fill(path, content: bytes, seed: int, threads: int = 4) -> None:
    """Write ``content`` in shuffled pieces, from a byte to more than a block, whose ends share pages."""
    draw = random.Random(seed)
    cuts, at = [0], 0
    while at < len(content):
        at = min(len(content), at + draw.choice([1, 100, 4096, 70_001, 300_000, 1 << 20, 5 << 20]))
        cuts.append(at)
    pieces = list(itertools.pairwise(cuts))
    draw.shuffle(pieces)
    with OutFile(path, len(content)) as file, ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(file.write, memoryview(content)[a:b], a) for a, b in pieces]
        for job in jobs:
            job.result()


@pytest.mark.parametrize("seed", range(6))
def test_a_file_holds_what_threads_wrote_in_any_order(tmp_path, seed):
    content = random.Random(seed).randbytes(9_000_017)
    fill(tmp_path / "file", content, seed)
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has none")
@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_file_system_without_direct_writes_gets_buffered_ones(tmp_path, monkeypatch, refused):
    real_open, real_pwrite = os.open, os.pwrite
    direct: set[int] = set()
    refusals = []

    def opened(path, flags, *args):
        if flags & os.O_DIRECT and refused == "open":
            refusals.append(path)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        descriptor = real_open(path, flags & ~os.O_DIRECT, *args)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def pwrite(descriptor, data, offset):
        if descriptor in direct:
            refusals.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real_pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwrite", pwrite)
    content = random.Random(1).randbytes(6_000_001)
    fill(tmp_path / "file", content, 1)
    monkeypatch.undo()
    assert refusals
    assert (tmp_path / "file").read_bytes() == content


def test_long_writes_are_page_aligned_where_they_go_past_the_cache(tmp_path, monkeypatch):
    real, seen = os.pwrite, []

    def pwrite(descriptor, data, offset):
        seen.append((descriptor, offset, len(data)))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with OutFile(tmp_path / "file", 3 << 20) as file:
        if file._direct < 0:
            pytest.skip("this file system has no direct writes")
        direct = file._direct
        file.write(memoryview(bytes(2_000_000)), 5)
    past = [(offset, count) for descriptor, offset, count in seen if descriptor == direct]
    assert past
    assert all(offset % 4096 == 0 and count % 4096 == 0 for offset, count in past)
    assert sum(count for *_, count in seen) == 2_000_000


def test_a_failing_disk_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with OutFile(tmp_path / "file", 1 << 20) as file:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(
            OutputError, match=r"file: writing failed: No space left on device\. Finished shards are kept"
        ):
            file.write(memoryview(bytes(600_000)), 0)
    monkeypatch.undo()
    with pytest.raises(OutputError, match="No such file or directory"):
        OutFile(tmp_path / "absent" / "file", 10)


def test_file_that_is_interrupted_while_its_room_is_claimed_is_closed(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, "posix_fallocate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        OutFile(tmp_path / "file", 10)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_has_the_name_already_is_left_alone(tmp_path, kind):
    mine = tmp_path / "mine"
    if kind != "dangling link":
        mine.write_text("mine")
    path = mine if kind == "file" else tmp_path / "file"
    if kind != "file":
        path.symlink_to(mine)
    with pytest.raises(OutputError, match="File exists"):
        OutFile(path, 10)
    assert mine.exists() == (kind != "dangling link")
    assert kind == "dangling link" or mine.read_text() == "mine"


def test_long_writes_reach_the_file_that_was_made_whatever_its_name_means_by_then(tmp_path, monkeypatch):
    real = os.posix_fallocate

    def swapping(*args):
        real(*args)
        (tmp_path / "file").rename(tmp_path / "moved")
        (tmp_path / "mine").write_text("mine")
        (tmp_path / "file").symlink_to(tmp_path / "mine")

    monkeypatch.setattr(os, "posix_fallocate", swapping)
    with OutFile(tmp_path / "file", 2_000_000) as file:
        file.write(memoryview(b"7" * 2_000_000), 0)
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "moved").read_bytes() == b"7" * 2_000_000


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room and run the same command again"),
        (errno.EDQUOT, "make room within your quota and run"),
        (errno.EROFS, "mount that file system for writing and run"),
        (errno.EACCES, "see to it that you may write there and run"),
        (errno.EXDEV, "are on one file system and run"),
        (errno.EIO, "see to that disk, or to the way to it, and run"),
        (errno.EINTR, "kept: run the same command again"),
    ],
    ids=lambda value: errno.errorcode.get(value, ""),
)
def test_the_advice_is_for_the_error(number, advice):
    text = str(disk_error("file", OSError(number, os.strerror(number))))
    assert text.startswith(f"file: writing failed: {os.strerror(number)}. Finished shards are kept: ")
    assert advice in text
    assert ("make room" in text) == (number in (errno.ENOSPC, errno.EDQUOT))
