"""Conversions killed at any moment: no half-success, and the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from _conversions import MIB, RECORDED, SHARDS, SLOWLY, Conversions, Trap, resumed_is_complete, same_files, states
from _inputs import fails

import octavo
from octavo.errors import OutputError, SourceChangedError

FOLDER = "octavo.conversion.folder:Folder"


# hundreds more are tried by `make faults`
@pytest.mark.parametrize("moment", [0, 3, 7, 11, 15, 19])
def test_conversion_killed_at_a_random_moment_goes_on(
    moment: int, conversions: Conversions, writes: int, large: Path, finished: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "out"
    # one in each twentieth of the run; by then, an earlier shard may or may not be synced, renamed and recorded
    count = 1 + int((moment + random.Random(moment).random()) / 20 * writes)
    conversions.start(large, dst, trap=("os", "pwrite", "", count), **SLOWLY)
    assert conversions.wait() == -signal.SIGKILL
    assert not dst.exists()
    resumed_is_complete(large, dst, finished)


def test_conversion_killed_again_and_again_gets_done(
    conversions: Conversions, writes: int, large: Path, finished: Path, tmp_path: Path
) -> None:
    dst, rng = tmp_path / "out", random.Random(0)
    kept: dict[str, tuple[int, int, int]] = {}
    for _ in range(20):
        trap = ("os", "pwrite", "", int(rng.uniform(0.1, 0.4) * writes))
        conversions.start(large, dst, trap=trap, **SLOWLY)
        code = conversions.wait()
        assert dst.exists() == (code == 0)
        now = states(dst if code == 0 else tmp_path / "out.partial" / "checkpoint")
        assert {name: now[name] for name in kept} == kept  # never written a second time
        if code == 0:
            break
        assert code == -signal.SIGKILL
        recorded = json.loads((tmp_path / "out.partial" / "manifest.json").read_text())["finished"]
        assert set(kept) <= set(recorded)
        kept = {name: now[name] for name in recorded}
    assert kept
    assert same_files(dst, finished)


@pytest.mark.parametrize("delay_ms", [0, 10, 60, 150])
def test_conversion_killed_from_outside_goes_on(
    delay_ms: int, conversions: Conversions, large: Path, finished: Path, tmp_path: Path
) -> None:
    """As the above, at moments that are no system call's: in the midst of reading, computing, waiting for the disk."""
    dst = tmp_path / "out"
    child = conversions.start(large, dst, **SLOWLY)
    time.sleep(delay_ms / 1000)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    if conversions.wait() == 0 or dst.exists():  # it was quick: then it must be complete
        assert same_files(dst, finished)
    else:
        resumed_is_complete(large, dst, finished)


@pytest.mark.parametrize(
    "trap",
    [
        # the lock and the manifest are synced first, then each shard and the manifest again
        pytest.param(("os", "fsync", "", 3), id="the first shard is written, not synced"),
        pytest.param(("os", "replace", "00001-of", 1), id="the first shard is synced, not renamed"),
        pytest.param((FOLDER, "write", RECORDED.format(1), 1), id="it is renamed, not recorded"),
        pytest.param(("os", "replace", "manifest", 2), id="its record is written, not renamed"),
        pytest.param(("os", "fsync", "", 13), id="the last shard is written, not synced"),
        pytest.param(("os", "replace", "00006-of", 1), id="the last shard is synced, not renamed"),
        pytest.param((FOLDER, "write", RECORDED.format(6), 1), id="the last is renamed, not recorded"),
        pytest.param((FOLDER, "new_file", "tokenizer", 1), id="all shards are recorded, nothing else is written"),
        pytest.param((FOLDER, "write", "index.json", 1), id="the config is written, the index is not"),
        pytest.param(("os", "rename", "out", 1), id="all is written, not renamed"),
    ],
)
def test_conversion_killed_between_two_steps_goes_on(
    trap: Trap, conversions: Conversions, large: Path, finished: Path, tmp_path: Path
) -> None:
    conversions.start(large, tmp_path / "out", trap=trap)
    assert conversions.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    resumed_is_complete(large, tmp_path / "out", finished)


def test_conversion_killed_after_the_last_rename_is_complete(
    conversions: Conversions, large: Path, finished: Path, tmp_path: Path
) -> None:
    dst = tmp_path / "out"
    conversions.start(large, dst, trap=("os", "unlink", "manifest", 1))
    assert conversions.wait() == -signal.SIGKILL
    assert same_files(dst, finished)
    fails(OutputError, "exists already", lambda: octavo.convert(large, dst))
    # its left-overs are in nobody's way, even when the result is no longer there
    dst.rename(tmp_path / "elsewhere")
    octavo.convert(large, dst)
    assert same_files(dst, finished)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_folder_is_never_visible_before_it_is_complete(
    conversions: Conversions, large: Path, finished: Path, tmp_path: Path
) -> None:
    dst, seen = tmp_path / "out", 0
    conversions.start(large, dst)
    while not dst.exists():
        seen += 1
        time.sleep(0.0005)
    assert same_files(dst, finished)
    assert seen
    assert conversions.wait() == 0


def test_left_overs_of_another_source_are_not_published(
    conversions: Conversions, large: Path, small: Path, tmp_path: Path
) -> None:
    """Killed before anything is recorded, a run leaves files that nothing tells from those of the next run."""
    dst = tmp_path / "out"
    conversions.start(large, dst, trap=(FOLDER, "write", RECORDED.format(1), 1))
    assert conversions.wait() == -signal.SIGKILL
    # another source altogether: refusing it would be right, too
    with contextlib.suppress(OutputError, SourceChangedError):
        octavo.convert(small, dst)
        octavo.convert(small, tmp_path / "clean")
        assert same_files(dst, tmp_path / "clean")


def test_conversion_to_several_tensors_a_weight_goes_on(conversions: Conversions, small: Path, tmp_path: Path) -> None:
    """NVFP4 has numbers, scales and a global scale; of the shard that is not recorded, they are written again."""
    dst = tmp_path / "out"
    octavo.convert(small, tmp_path / "undisturbed", "nvfp4", prove=False)
    conversions.start(small, dst, "nvfp4", trap=("os", "replace", "00002-of", 1), **SLOWLY)
    assert conversions.wait() == -signal.SIGKILL
    recorded = json.loads((tmp_path / "out.partial" / "manifest.json").read_text())["finished"]
    before = states(tmp_path / "out.partial" / "checkpoint")
    assert len(recorded) == 1
    octavo.convert(small, dst, "nvfp4", prove=False)
    assert {name: states(dst)[name] for name in recorded} == {name: before[name] for name in recorded}
    assert same_files(dst, tmp_path / "undisturbed")
    assert octavo.verify(dst, small).ok


def test_fixture_is_large_enough_to_be_killed(large: Path) -> None:
    sizes = [file.stat().st_size for file in large.glob("*.safetensors")]
    assert len(sizes) == SHARDS
    assert min(sizes) > 8 * MIB
