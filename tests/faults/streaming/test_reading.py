"""Files that change, vanish or fail while they are read: no hang, no half-loaded model, no thread left over."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _inputs import MODEL, fails, split_in_two

import octavo
from octavo.errors import CheckpointError, SourceChangedError

pytest.importorskip("transformers")

SECOND = "model-00002-of-00002.safetensors"


def _touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _grow(file: Path) -> None:
    with open(file, "ab") as opened:
        opened.write(b"more")


def _rewrite(file: Path) -> None:
    raw = file.read_bytes()
    file.unlink()
    file.write_bytes(raw)
    os.utime(file, ns=(1, 1))


def _replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


#: case -> (what happens to the file, what the error says)
CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "is written to": (_touch, "changed since it was opened"),
    "is truncated": (_truncate, "changed since it was opened"),
    "grows": (_grow, "changed since it was opened"),
    "is replaced": (_rewrite, "changed since it was opened"),
    "is deleted": (Path.unlink, "can't be read any more: No such file"),
    "becomes a folder": (_replace_by_folder, "changed since it was opened"),
}


@pytest.fixture
def after_planning(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Have something happen between opening a checkpoint and reading its first weight byte."""
    from octavo.adapters.transformers import model_plan, remembered

    original = model_plan.plan_model

    def arrange(action: Callable[[], Any]) -> None:
        def plan_model(*args: Any, **kwargs: Any) -> Any:
            plan = original(*args, **kwargs)
            action()
            return plan

        monkeypatch.setattr(remembered, "plan_model", plan_model)

    return arrange


class Reads:
    """Stands for `os.preadv`; ``fault`` is called with the number of each read, and may return a result of its own."""

    def __init__(self, fault: Callable[[int], int | None]) -> None:
        self.fault, self.count, self.lock, self.preadv = fault, 0, threading.Lock(), os.preadv

    def __call__(self, descriptor: int, buffers: Any, offset: int) -> int:
        with self.lock:
            self.count += 1
            number = self.count
        result = self.fault(number)
        return self.preadv(descriptor, buffers, offset) if result is None else result


@pytest.mark.parametrize("case", CHANGES)
def test_file_that_changes_after_it_was_opened_is_named(
    case: str, llama: Path, after_planning: Callable[[Callable[[], Any]], None]
) -> None:
    change, says = CHANGES[case]
    after_planning(lambda: change(llama / MODEL))
    fails(SourceChangedError, (str(llama / MODEL), says), lambda: octavo.load(llama))


@pytest.mark.parametrize("case", CHANGES)
def test_only_the_shard_that_changes_is_named(
    case: str, llama: Path, after_planning: Callable[[Callable[[], Any]], None]
) -> None:
    change, says = CHANGES[case]
    split_in_two(llama)
    after_planning(lambda: change(llama / SECOND))
    text = fails(SourceChangedError, (str(llama / SECOND), says), lambda: octavo.load(llama, threads=3))
    assert "model-00001-of-00002" not in text


@pytest.mark.parametrize("case", ["is written to", "is truncated", "grows", "is deleted"])
def test_file_that_changes_while_it_is_read_is_named(case: str, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, _ = CHANGES[case]
    reads = Reads(lambda number: change(llama / MODEL) if number == 3 else None)
    monkeypatch.setattr(os, "preadv", reads)
    fails(SourceChangedError, str(llama / MODEL), lambda: octavo.load(llama, threads=1))
    assert reads.count >= 3


def test_file_that_changes_is_named_on_the_route_through_from_pretrained(
    llama: Path, after_planning: Callable[[Callable[[], Any]], None]
) -> None:
    from transformers import AutoModelForCausalLM

    after_planning(lambda: _truncate(llama / MODEL))
    load = AutoModelForCausalLM.from_pretrained
    says = (str(llama / MODEL), "changed since it was opened")
    fails(SourceChangedError, says, lambda: load(llama, quantization_config=octavo.OctavoConfig()))


@pytest.mark.parametrize("threads", [1, 6])
@pytest.mark.parametrize("number", [1, 7])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_tensor"])
def test_read_error_is_named_with_its_file(
    threads: int, number: int, scheme: str, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(count: int) -> int | None:
        if count == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return None

    monkeypatch.setattr(os, "preadv", Reads(fault))
    says = (str(moe / MODEL), "bytes at", "Input/output error")
    fails(CheckpointError, says, lambda: octavo.load(moe, scheme, threads=threads))


@pytest.mark.parametrize("threads", [1, 6])
@pytest.mark.parametrize("number", [1, 5])
def test_file_that_ends_early_is_named(threads: int, number: int, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", Reads(lambda count: 0 if count >= number else None))
    says = (str(llama / MODEL), "ended at byte", "Run again when nothing writes")
    fails(SourceChangedError, says, lambda: octavo.load(llama, threads=threads))


def test_short_reads_are_continued(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = octavo.load(llama).state_dict()
    original = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: original(fd, [buffers[0][:999]], offset))
    pieces = octavo.load(llama).state_dict()
    assert all(pieces[name].float().equal(whole[name].float()) for name in whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_shard_that_loses_its_permission_is_named(
    llama: Path, after_planning: Callable[[Callable[[], Any]], None]
) -> None:
    after_planning(lambda: (llama / MODEL).chmod(0))
    fails(CheckpointError, (str(llama / MODEL), "Permission denied"), lambda: octavo.load(llama))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE])
def test_shard_that_cannot_be_opened_again_is_named(number: int, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> int:
        if str(path).endswith(MODEL):
            raise OSError(number, os.strerror(number))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    fails(CheckpointError, (MODEL, os.strerror(number)), lambda: octavo.load(llama))


@pytest.mark.parametrize("raised", [ZeroDivisionError, KeyboardInterrupt])
def test_progress_that_raises_ends_the_load(raised: type[BaseException], llama: Path) -> None:
    def progress(done: int, total: int) -> None:
        raise raised

    with pytest.raises(raised):  # the user's own, hence unchanged
        octavo.load(llama, progress=progress)


def test_load_succeeds_once_the_fault_is_gone(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = (llama / MODEL).read_bytes()
    os.truncate(llama / MODEL, len(raw) - 4)
    fails(CheckpointError, "the download is incomplete", lambda: octavo.load(llama))
    (llama / MODEL).write_bytes(raw)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", Reads(lambda count: 0))
        fails(SourceChangedError, "ended at byte", lambda: octavo.load(llama))
    assert octavo.load(llama).load_report.quantized["fp8_channel"][0] == 14


def test_a_load_that_verifies_finds_a_flipped_bit(llama: Path, tmp_path: Path) -> None:
    octavo.convert(llama, tmp_path / "copy", None, digests=True)
    octavo.load(tmp_path / "copy", verify=True)
    file = tmp_path / "copy" / MODEL
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 16
    file.write_bytes(raw)
    octavo.load(tmp_path / "copy")
    says = (str(file), "the digest of its bytes is", "fetch it again, or convert again")
    fails(CheckpointError, says, lambda: octavo.load(tmp_path / "copy", verify=True))
    fails(CheckpointError, "has no octavo-digests.json", lambda: octavo.load(llama, verify=True))
