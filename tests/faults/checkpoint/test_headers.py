"""One bad safetensors file: `Checkpoint.open` names the file, the tensor, and what was found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from _inputs import entry, fails, write_entries, write_raw, write_tensors

from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("no_weight_is_read")

#: case -> (whole content of the file, what the error says)
FILES: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "0 bytes long, too short"),
    "a file of seven bytes": (b"\x10" + bytes(6), "7 bytes long, too short"),
    "a length field alone": ((200).to_bytes(8, "little"), "declares 200 bytes, the file holds 0"),
    "all bits of the length field set": (b"\xff" * 8 + b"{}", "18,446,744,073,709,551,615 bytes"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "header too long"),
    "an HTML page": (b"<!DOCTYPE html><html><body>404</body></html>", "header too long"),
    "a zip archive, which torch.save writes": (b"PK\x03\x04\x00\x00\x00\x00" + bytes(64), "header declares 67,324,752"),
}

#: case -> (header, what the error says)
HEADERS: dict[str, tuple[bytes, str]] = {
    "an empty header": (b"", "does not start with '{'"),
    "a header that is no JSON": (b"{not json at all", "not valid JSON"),
    "a header that is cut off": (b'{"a": {"dtype": "BF16", "shape"', "not valid JSON"),
    "text behind the header's object": (b'{} {"a": 1}', "not valid JSON"),
    "a header that is no UTF-8": (b'{"\xff\xfe": {}}', "not valid JSON"),
    "a header that is an array": (b"[1, 2]", "does not start with '{'"),
    "a header that starts with a space": (b" {}", "does not start with '{'"),
    "a header that starts with a byte order mark": (b"\xef\xbb\xbf{}", "does not start with '{'"),
    "a header nested a hundred thousand deep": (b'{"a":' * 100_000, "not valid JSON"),
    "a number of ten thousand digits": (b'{"a": ' + b"9" * 10_000 + b"}", "a number of 10,000 digits; at most 100"),
    "a number of a hundred and one digits": (b'{"a": ' + b"9" * 101 + b"}", "a number of 101 digits; at most 100"),
    "a side of minus zero": (
        b'{"a": {"dtype": "U8", "shape": [-0], "data_offsets": [0, 0]}}',
        "shape [-0.0] is not a list of non-negative integers",
    ),
    "metadata that are no object": (b'{"__metadata__": "pt"}', "__metadata__ must map strings"),
    "metadata with a number": (b'{"__metadata__": {"format": 1}}', "__metadata__ must map strings"),
    "metadata that are null": (b'{"__metadata__": null}', "__metadata__ must map strings"),
    "metadata with half a surrogate pair": (b'{"__metadata__": {"a": "\\ud800"}}', "__metadata__ is no Unicode text"),
    "a tensor named twice": (b'{"a": {}, "b": {}, "a": {}}', "the key 'a' appears twice"),
    "metadata given twice": (b'{"__metadata__": {}, "__metadata__": {}}', "the key '__metadata__' appears twice"),
    "a dtype given twice": (b'{"a": {"dtype": "BF16", "dtype": "F32"}}', "the key 'dtype' appears twice"),
}

_NO_DTYPE = {"shape": [2, 3], "data_offsets": [0, 12]}
_NO_SHAPE = {"dtype": "BF16", "data_offsets": [0, 12]}
_NO_OFFSETS = {"dtype": "BF16", "shape": [2, 3]}

#: case -> (entries, bytes of data, what the error says)
ENTRIES: dict[str, tuple[dict[str, Any], int, str]] = {
    "an entry without a dtype": ({"w": _NO_DTYPE}, 12, "tensor 'w': an entry must have exactly"),
    "an entry without a shape": ({"w": _NO_SHAPE}, 12, "tensor 'w': an entry must have exactly"),
    "an entry without offsets": ({"w": _NO_OFFSETS}, 0, "tensor 'w': an entry must have exactly"),
    "an entry with an extra key": ({"w": entry(strides=[3, 1])}, 12, "tensor 'w': an entry must have exactly"),
    "an entry that is a list": ({"w": [1, 2]}, 0, "tensor 'w': an entry must have exactly"),
    "an entry that is null": ({"w": None}, 0, "tensor 'w': an entry must have exactly"),
    "an unknown dtype": ({"w": entry("BF17")}, 12, "tensor 'w': unknown dtype 'BF17'"),
    "a dtype in lower case": ({"w": entry("bf16")}, 12, "tensor 'w': unknown dtype 'bf16'"),
    "a dtype that is a number": ({"w": entry(16)}, 12, "tensor 'w': unknown dtype 16"),
    "a dtype that is a list": ({"w": entry(["BF16"])}, 12, "tensor 'w': unknown dtype ['BF16']"),
    "a shape that is a number": ({"w": entry(shape=6)}, 12, "tensor 'w': shape 6 is not a list"),
    "a shape that is null": ({"w": entry(shape=None)}, 12, "tensor 'w': shape None is not a list"),
    "a negative side": ({"w": entry(shape=(-2, -3))}, 12, "tensor 'w': shape [-2, -3] is not a list"),
    "a side that is a float": ({"w": entry(shape=(2.0, 3))}, 12, "tensor 'w': shape [2.0, 3] is not a list"),
    "a side that is a bool": ({"w": entry(shape=(True, 6))}, 12, "tensor 'w': shape [True, 6] is not a list"),
    "a side that is text": ({"w": entry(shape=("2", 3))}, 12, "tensor 'w': shape ['2', 3] is not a list"),
    "a side that is NaN": ({"w": entry(shape=(float("nan"), 3))}, 12, "tensor 'w': shape [nan, 3] is not a list"),
    "a side of 2**63": ({"w": entry(shape=(2**63, 2))}, 12, "tensor 'w': shape [9223372036854775808, 2] is not a list"),
    "a side of ninety digits": (
        {"w": entry(shape=(10**90,))},
        12,
        "000] is not a list of non-negative integers",
    ),
    "an empty tensor with a side of 2**63": (
        {"w": entry("U8", (2**63, 0), 0, 0)},
        0,
        "tensor 'w': shape [9223372036854775808, 0] is not a list of non-negative integers of 63 bits",
    ),
    "an empty tensor of which torch can't compute strides": (
        {"w": entry("U8", (2**62, 2**62, 0), 0, 0)},
        0,
        "takes more elements than 63 bits can count",
    ),
    "sides whose product has thousands of digits": (
        {"w": entry("U8", (2**62,) * 60, 0, 0)},
        0,
        "takes more elements than 63 bits can count",
    ),
    "thousands of sides": (
        {"w": entry("U8", (1,) * 20_000, 0, 1)},
        1,
        "tensor 'w': its shape has 20,000 axes, and may have at most 64",
    ),
    "offsets of ninety digits": ({"w": entry(end=10**90)}, 12, "are not two non-negative integers of 63 bits"),
    "a name of 50,000 characters": (
        {"norm" * 12_500: entry()},
        12,
        "its name is 50,000 characters long, and may be of at most 1,024",
    ),
    "a name with half a surrogate pair": ({"m.\ud800.weight": entry()}, 12, "its name is no Unicode text"),
    "sides that overflow 64 bits to the right size": (
        {"w": entry("U8", (2**32, 2**32), 0, 0)},
        0,
        "tensor 'w': U8 [4294967296, 4294967296] takes more elements than 63 bits can count",
    ),
    "too few bytes for the shape": ({"w": entry(end=10)}, 10, "BF16 [2, 3] takes 12 bytes, data_offsets give 10"),
    "too many bytes for the shape": ({"w": entry(end=16)}, 16, "BF16 [2, 3] takes 12 bytes, data_offsets give 16"),
    "bytes of the wrong dtype": ({"w": entry("F32")}, 12, "F32 [2, 3] takes 24 bytes, data_offsets give 12"),
    "half a byte": ({"w": entry("F4", (3,), 0, 1)}, 1, "F4 [3] takes 1.5 bytes, data_offsets give 1"),
    "one offset": ({"w": {**_NO_OFFSETS, "data_offsets": [12]}}, 12, "data_offsets [12] are not two"),
    "three offsets": ({"w": {**_NO_OFFSETS, "data_offsets": [0, 6, 12]}}, 12, "data_offsets [0, 6, 12] are not two"),
    "a negative offset": ({"w": entry(begin=-12, end=0)}, 0, "data_offsets [-12, 0] are not two"),
    "an offset that is a float": ({"w": entry(end=12.0)}, 12, "data_offsets [0, 12.0] are not two"),
    "offsets reversed": ({"w": entry(begin=12, end=0)}, 12, "data_offsets end at 0 before they begin at 12"),
    "two tensors that overlap": (
        {"v": entry(), "w": entry(begin=8, end=20)},
        20,
        "tensor 'w': overlaps the tensor before it: begins at 8, that one ends at 12",
    ),
    "two tensors in the same place": (
        {"v": entry(), "w": entry()},
        12,
        "overlaps the tensor before it: begins at 0, that one ends at 12",
    ),
    "a gap between tensors": (
        {"v": entry(), "w": entry(begin=16, end=28)},
        28,
        "tensor 'w': 4 bytes before it belong to no tensor (a gap)",
    ),
    "a gap before the first tensor": ({"w": entry(begin=4, end=16)}, 16, "4 bytes before it belong to no tensor"),
    "offsets beyond the file": ({"w": entry()}, 4, "header declares 12 data bytes, file holds 4: the download is"),
    "offsets far beyond the file": (
        {"w": entry("U8", (2**62,), 0, 2**62)},
        12,
        "header declares 4,611,686,018,427,387,904 data bytes, file holds 12",
    ),
    "data missing altogether": ({"w": entry()}, 0, "header declares 12 data bytes, file holds 0"),
    "trailing bytes": ({"w": entry()}, 15, "header declares 12 data bytes, file holds 15: bytes that no tensor owns"),
    "bytes and no tensor": ({}, 8, "header declares 0 data bytes, file holds 8"),
}


#: what octavo refuses alone -> why
_TAKEN_BY_SAFETENSORS = {
    "an entry with an extra key": "safetensors passes over extra keys; octavo does not: they may mean another layout",
    "an empty tensor with a side of 2**63": "safetensors counts in 64 bits; torch does not",
    "thousands of sides": "safetensors takes any number",
    "a name of 50,000 characters": "safetensors takes any length",
}


@pytest.mark.parametrize("case", FILES)
def test_file_that_is_no_safetensors_is_named(case: str, tmp_path: Path) -> None:
    content, says = FILES[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    fails(CheckpointError, ("model.safetensors", says), lambda: Checkpoint.open(file))
    fails(CheckpointError, ("model.safetensors", says), lambda: Checkpoint.open(tmp_path))


@pytest.mark.parametrize("case", HEADERS)
def test_malformed_header_is_named(case: str, tmp_path: Path) -> None:
    header, says = HEADERS[case]
    file = write_raw(tmp_path / "model.safetensors", header, bytes(12))
    fails(CheckpointError, ("model.safetensors", says), lambda: Checkpoint.open(file))


@pytest.mark.parametrize("case", ENTRIES)
def test_malformed_entry_is_named(case: str, tmp_path: Path) -> None:
    entries, data_bytes, says = ENTRIES[case]
    file = write_entries(tmp_path / "model.safetensors", entries, data_bytes)
    fails(CheckpointError, ("model.safetensors", says), lambda: Checkpoint.open(file))


@pytest.mark.parametrize("case", ENTRIES)
def test_safetensors_rejects_what_octavo_rejects(case: str, tmp_path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    entries, data_bytes, _ = ENTRIES[case]
    if reason := _TAKEN_BY_SAFETENSORS.get(case):
        pytest.skip(reason)
    file = write_entries(tmp_path / "model.safetensors", entries, data_bytes)
    with pytest.raises((SafetensorError, OSError)), safe_open(file, "pt"):
        pass


def test_header_longer_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "model.safetensors", b"{}", declared=100_000_001)
    os.truncate(file, 200_000_000)
    says = ("model.safetensors", "declares 100,000,001 bytes, the format allows 100,000,000")
    fails(CheckpointError, says, lambda: Checkpoint.open(file))


def test_all_problems_of_all_files_come_in_one_message(tmp_path: Path) -> None:
    write_entries(tmp_path / "model-00001-of-00003.safetensors", {"a": entry("BF17"), "b": entry(begin=12, end=20)}, 20)
    write_raw(tmp_path / "model-00002-of-00003.safetensors", b"[]")
    write_entries(tmp_path / "model-00003-of-00003.safetensors", {"c": entry()}, 7)
    says = (
        str(tmp_path),
        "4 problems",
        "model-00001-of-00003.safetensors: tensor 'a': unknown dtype 'BF17'",
        "model-00001-of-00003.safetensors: tensor 'b': BF16 [2, 3] takes 12 bytes, data_offsets give 8",
        "model-00002-of-00003.safetensors: header does not start with '{'",
        "model-00003-of-00003.safetensors: header declares 12 data bytes, file holds 7",
    )
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))


def test_bad_entry_does_not_make_its_neighbours_look_bad(tmp_path: Path) -> None:
    entries = {"a": entry(), "b": entry("BF17", begin=12, end=24), "c": entry(begin=24, end=36)}
    text = fails(
        CheckpointError,
        "tensor 'b'",
        lambda: Checkpoint.open(write_entries(tmp_path / "model.safetensors", entries, 36)),
    )
    assert "'a'" not in text
    assert "'c'" not in text
    assert "data bytes" not in text


def test_hundreds_of_problems_are_counted_and_cut_short(tmp_path: Path) -> None:
    entries = {f"t{i}": entry("BF17", begin=12 * i, end=12 * i + 12) for i in range(300)}
    file = write_entries(tmp_path / "model.safetensors", entries, 3600)
    text = fails(CheckpointError, ("300 problems", "... and 250 more"), lambda: Checkpoint.open(file))
    assert len(text.splitlines()) < 60


def test_problems_of_a_tebibyte_are_found_without_reading_it(tmp_path: Path) -> None:
    tib = 1 << 40
    entries = {"a": entry("U8", (tib,), 0, tib), "b": entry(begin=tib + 1, end=tib + 13)}
    file = write_raw(tmp_path / "model.safetensors", json.dumps(entries).encode())
    try:
        os.truncate(file, file.stat().st_size + tib + 13)
    except OSError:
        pytest.skip("the file system has no files of a TiB")
    fails(CheckpointError, "tensor 'b': 1 bytes before it belong to no tensor", lambda: Checkpoint.open(file))


def test_headers_of_more_parts_or_tensors_than_a_model_has_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_raw(tmp_path / "model.safetensors", b'{"a": [' + b"[]," * 2_000_000 + b"1]}")
    fails(CheckpointError, "2,000,002 lists and objects; at most 2,000,000", lambda: Checkpoint.open(file))
    monkeypatch.setattr("octavo.checkpoint.checkpoint.MAX_TENSORS", 3)
    for number in (1, 2, 3):
        write_tensors(tmp_path / f"model-0000{number}-of-00003.safetensors", f"a{number}", f"b{number}")
    file.unlink()
    says = (str(tmp_path), "4 tensors in 2 of 3 files", "at most 3")
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))


def test_tensors_and_checkpoints_have_a_largest_size(tmp_path: Path) -> None:
    tib = 1 << 40
    file = write_raw(tmp_path / "model.safetensors", json.dumps({"a": entry("U8", (5 * tib,), 0, 5 * tib)}).encode())
    says = ("tensor 'a': 5,497,558,138,880 bytes large", "of at most 4,398,046,511,104")
    fails(CheckpointError, says, lambda: Checkpoint.open(file))
    entries = {f"t{i}": entry("U8", (tib, 4), 4 * tib * i, 4 * tib * (i + 1)) for i in range(17)}
    file = write_raw(tmp_path / "model.safetensors", json.dumps(entries).encode())
    says = ("74,766,790,688,768 bytes in all; octavo reads checkpoints of at most 70,368,744,177,664",)
    fails(CheckpointError, says, lambda: Checkpoint.open(file))


def test_sound_file_beside_the_broken_ones_opens(tmp_path: Path) -> None:
    # that the cases above fail for their own reason, and not for what they share
    file = write_entries(tmp_path / "model.safetensors", {"w": entry(), "v": entry("F32", (), 12, 16)}, 16)
    assert set(Checkpoint.open(file).tensors) == {"w", "v"}
    assert set(Checkpoint.open(write_tensors(tmp_path / "other.safetensors", "a")).tensors) == {"a"}
    assert Checkpoint.open(write_raw(tmp_path / "empty.safetensors", b"{}  ")).tensors == {}
