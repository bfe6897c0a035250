"""Files beside the weights: links that lead out of a checkpoint, and what others may do with what is made."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from _conversions import same_files
from _inputs import fails

import octavo
from octavo.errors import CheckpointError


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    secret = tmp_path / "home" / "secret.json"
    secret.write_text('{"password": "1234"}')
    return secret


@pytest.mark.parametrize("name", ["tokenizer.json", "notes.txt", "generation_config.json"])
def test_link_that_leads_out_of_a_checkpoint_is_not_copied(
    name: str, secret: Path, small: Path, tmp_path: Path
) -> None:
    (small / name).symlink_to(secret)
    report = octavo.convert(small, tmp_path / "out")
    assert not os.path.lexists(tmp_path / "out" / name)
    assert f"links that lead out of the checkpoint are not copied: {name}" in report.notes


def test_config_that_is_a_link_out_of_a_checkpoint_is_refused(secret: Path, small: Path, tmp_path: Path) -> None:
    (small / "config.json").unlink()
    (small / "config.json").symlink_to(secret)
    says = ["config.json", "leads out of the checkpoint", str(secret)]
    fails(CheckpointError, says, lambda: octavo.convert(small, tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()


def test_links_within_the_cache_of_a_hub_are_followed(small: Path, tmp_path: Path) -> None:
    (small / "tokenizer.json").write_text("{}")
    octavo.convert(small, tmp_path / "undisturbed")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "1a2b"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(small.iterdir())):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number}")
    report = octavo.convert(snapshot, tmp_path / "out")
    assert same_files(tmp_path / "out", tmp_path / "undisturbed")
    assert not any("links" in note for note in report.notes)


def test_links_within_a_folder_and_to_a_folder_are_followed(small: Path, tmp_path: Path) -> None:
    (small / "..data").mkdir()
    (small / "..data" / "tokenizer.json").write_text("{}")
    (small / "tokenizer.json").symlink_to("..data/tokenizer.json")
    (tmp_path / "latest").symlink_to(small)
    octavo.convert(tmp_path / "latest", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


# -- permissions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.iterdir()]}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0], indirect=True, ids=oct)
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o664], ids=oct)
def test_what_is_made_may_be_read_by_no_more_than_its_source(
    mode: int, umask: int, small: Path, tmp_path: Path
) -> None:
    """One rule for weights, config, index and copies, and that of `cp`: the mode of the source, less the umask."""
    (small / "tokenizer.json").write_text("{}")
    for file in small.iterdir():
        file.chmod(mode)
    folder = 0o700 | mode | (mode & 0o444) >> 2
    small.chmod(folder)
    octavo.convert(small, tmp_path / "out")
    found = modes(tmp_path / "out")
    assert found.pop("out") == folder & ~umask | 0o700
    assert len(found) == 6
    assert set(found.values()) == {mode & ~umask | 0o600}


def test_each_file_has_the_mode_of_what_it_is_made_from(small: Path, tmp_path: Path) -> None:
    (small / "tokenizer.json").write_text("{}")
    for number, file in enumerate(sorted(small.iterdir())):
        file.chmod([0o600, 0o640, 0o644][number % 3])
    octavo.convert(small, tmp_path / "out")
    found, given = modes(tmp_path / "out"), modes(small)
    assert {name: given[name] for name in found if name != "out"} == {n: m for n, m in found.items() if n != "out"}


def test_lone_file_gives_its_mode_to_the_file_alone(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "alone.safetensors"
    (small / "model-00001-of-00003.safetensors").rename(file)
    file.chmod(0o600)
    octavo.convert(file, tmp_path / "out")
    assert modes(tmp_path / "out") == {"out": 0o755, "model.safetensors": 0o600}
