"""Folders of sentence-transformers: what modules.json names goes along, and nothing else, wherever links lead."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from _inputs import fails
from safetensors.torch import save_file

import octavo
from octavo.conversion.small_files import SmallFile
from octavo.errors import CheckpointError, OutputError

POOLING, DENSE = '{"pooling_mode_mean_tokens": true}', {"linear.weight": torch.ones(4, 4)}


def modules(folder: Path, *paths: str) -> Path:
    entries = [{"idx": i, "name": str(i), "path": path, "type": "x.Module"} for i, path in enumerate(("", *paths))]
    (folder / "modules.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def embedder(small: Path) -> Path:
    (small / "1_Pooling").mkdir()
    (small / "1_Pooling" / "config.json").write_text(POOLING)
    (small / "2_Dense" / "more").mkdir(parents=True)
    save_file(DENSE, small / "2_Dense" / "model.safetensors")
    (small / "2_Dense" / "more" / "pytorch_model.bin").write_bytes(b"a pickle")
    return modules(small, "1_Pooling", "2_Dense", "3_Normalize")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


COPIED = ("1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/more/pytorch_model.bin")


def test_folders_that_modules_json_names_are_copied_with_their_weights(embedder: Path, tmp_path: Path) -> None:
    (embedder / "onnx").mkdir()
    (embedder / "onnx" / "model.onnx").touch()
    report = octavo.convert(embedder, tmp_path / "out")
    assert files(tmp_path / "out") == files(embedder) - {"onnx/model.onnx"}
    for name in COPIED:
        assert (tmp_path / "out" / name).read_bytes() == (embedder / name).read_bytes()
    assert "copied as they are, since modules.json names them: 1_Pooling and 2_Dense" in report.notes
    assert "subfolders are not copied: onnx" in report.notes
    assert octavo.verify(tmp_path / "out", against=embedder).ok


def test_a_folder_in_a_folder_is_copied_without_what_lies_beside_it(embedder: Path, tmp_path: Path) -> None:
    octavo.convert(modules(embedder, "2_Dense/more"), tmp_path / "out")
    assert files(tmp_path / "out") == files(embedder) - set(COPIED) | {"2_Dense/more/pytorch_model.bin"}


def test_a_killed_conversion_goes_on_to_the_same_files(
    embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    octavo.convert(embedder, tmp_path / "undisturbed")
    original, copied = SmallFile.copy, []

    def copy(file: SmallFile, *args: object) -> None:
        original(file, *args)  # type: ignore[arg-type]
        copied.append(file.name)
        if file.name == COPIED[1]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SmallFile, "copy", copy)
        with pytest.raises(KeyboardInterrupt):
            octavo.convert(embedder, tmp_path / "out")
    assert COPIED[1] in copied
    assert (tmp_path / "out.partial" / "checkpoint" / COPIED[1]).exists()
    octavo.convert(embedder, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.fixture
def begun(embedder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a conversion that was interrupted after all was copied."""

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("octavo.conversion.partial.PartialFolder.publish", fail)
        with pytest.raises(KeyboardInterrupt):
            octavo.convert(embedder, tmp_path / "out")
    return tmp_path / "out.partial" / "checkpoint"


@pytest.mark.parametrize("place", ["2_Dense/mine.txt", "2_Dense/more/mine.txt", "2_Dense/more/folder/mine.txt"])
def test_a_file_of_somebody_else_in_such_a_folder_is_refused_and_kept(
    place: str, begun: Path, embedder: Path, tmp_path: Path
) -> None:
    (begun / place).parent.mkdir(exist_ok=True)
    (begun / place).write_text("mine")
    before = files(begun)
    fails(OutputError, ("not made by octavo",), lambda: octavo.convert(embedder, tmp_path / "out"))
    assert files(begun) == before


@pytest.mark.parametrize("place", ["1_Pooling", "2_Dense/more", "2_Dense/model.safetensors"])
def test_a_planted_link_in_place_of_such_a_folder_or_file_is_not_followed(
    place: str, begun: Path, embedder: Path, tmp_path: Path
) -> None:
    (begun / place).rename(tmp_path / "elsewhere")
    (begun / place).symlink_to(tmp_path / "elsewhere")
    fails(OutputError, ("(a link)", "not made by octavo"), lambda: octavo.convert(embedder, tmp_path / "out"))
    assert (tmp_path / "elsewhere").exists()


def test_links_that_lead_out_are_not_copied(embedder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (embedder / "1_Pooling" / "config.json").unlink()
    (embedder / "1_Pooling" / "config.json").symlink_to(secret)
    (embedder / "4_Linked").symlink_to(tmp_path)
    report = octavo.convert(modules(embedder, "1_Pooling", "4_Linked", "../..", "/etc"), tmp_path / "out")
    assert "links that lead out of the checkpoint are not copied: 1_Pooling/config.json" in report.notes
    assert not {name for name in files(tmp_path / "out") if "/" in name}


def test_links_of_a_hub_s_cache_are_followed(embedder: Path, tmp_path: Path) -> None:
    octavo.convert(embedder, tmp_path / "undisturbed")
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "1a", tmp_path / "models--x" / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(sorted(files(embedder))):
        (embedder / name).rename(blobs / str(number))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    octavo.convert(snapshot, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_what_is_made_of_a_private_folder_is_private(embedder: Path, tmp_path: Path) -> None:
    for path in (embedder / "2_Dense", embedder / "2_Dense" / "model.safetensors"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    octavo.convert(embedder, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out" / "2_Dense").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "out" / "2_Dense" / "model.safetensors").stat().st_mode) == 0o600


def test_a_folder_of_thousands_of_files_is_refused(embedder: Path, tmp_path: Path) -> None:
    for number in range(1001):
        (embedder / "1_Pooling" / f"{number}").touch()
    fails(
        CheckpointError, ("1_Pooling: holds more than 1,000 files",), lambda: octavo.convert(embedder, tmp_path / "out")
    )


@pytest.mark.parametrize(
    "paths", [["config.json"], ["nothing"], ["\0"], ["1_Pooling", "1_Pooling"], ["."], ["x" * 2000]]
)
def test_paths_of_all_sorts_are_passed_over(paths: list[str], embedder: Path, tmp_path: Path) -> None:
    octavo.convert(modules(embedder, *paths), tmp_path / "out")
    assert (tmp_path / "out" / "modules.json").exists()


def test_the_config_of_an_adapter_is_left_behind(small: Path, tmp_path: Path) -> None:
    """transformers with peft would look for the adapter, and for its model, instead of what was converted."""
    (small / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    report = octavo.convert(small, tmp_path / "out")
    assert "adapter_config.json is not copied: readers would look for its adapter" in report.notes
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_a_file_that_the_config_names_is_read_and_no_longer_named(small: Path, tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(32, 32)}, small / "own.safetensors")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "transformers_weights": "own.safetensors"}))
    octavo.convert(small, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()).keys() == config.keys() | {"quantization_config"}
    assert (tmp_path / "out" / "model.safetensors").exists()
