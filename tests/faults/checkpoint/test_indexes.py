"""Indexes that disagree with the headers of their shards, and folders with more than one checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from _inputs import INDEX, MODEL, fails, write_index, write_raw, write_tensors

from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("no_weight_is_read")

ONE, TWO = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))


def indexed(folder: Path, weight_map: dict[str, str], **tensors: str) -> Path:
    for name, names in tensors.items():
        write_tensors(folder / name, *names.split())
    return write_index(folder, weight_map)


def found(folder: Path) -> tuple[dict[str, str], str]:
    """Tensor -> the file that it is read from, and all notes."""
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.shard_of(name).path.name for name in checkpoint.tensors}, "\n".join(checkpoint.notes)


# -- an index and headers ---------------------------------------------------------------------------------------------


def test_index_that_agrees_is_worth_no_word(tmp_path: Path) -> None:
    assert found(indexed(tmp_path, {"a": ONE, "b": TWO}, **{ONE: "a", TWO: "b"})) == ({"a": ONE, "b": TWO}, "")


def test_tensors_that_only_the_index_has_are_noted(tmp_path: Path) -> None:
    where, notes = found(indexed(tmp_path, {"a": ONE, "b": TWO, "mtp.fc": TWO}, **{ONE: "a", TWO: "b"}))
    assert where == {"a": ONE, "b": TWO}
    assert notes == f"{INDEX} names tensors that no shard holds: mtp.fc"


def test_of_many_such_tensors_a_few_are_named(tmp_path: Path) -> None:
    index = {"a": ONE} | {f"x{number}": ONE for number in range(2_000)}
    assert (
        f"{INDEX} names tensors that no shard holds: x0, x1, x2 and 1,997 more"
        in found(indexed(tmp_path, index, **{ONE: "a"}))[1]
    )


def test_tensors_that_the_index_lacks_are_read_as_other_readers_do(tmp_path: Path) -> None:
    where, notes = found(indexed(tmp_path, {"a": ONE, "b": TWO}, **{ONE: "a inv_freq", TWO: "b"}))
    assert where == {"a": ONE, "inv_freq": ONE, "b": TWO}
    assert notes == f"{INDEX} does not name tensors of its shards, which are read: inv_freq"


def test_tensors_are_found_where_they_are(tmp_path: Path) -> None:
    where, notes = found(indexed(tmp_path, {"a": TWO, "b": ONE}, **{ONE: "a", TWO: "b"}))
    assert where == {"a": ONE, "b": TWO}
    assert f"says of a and b that they are in another shard than they are: a is in {ONE}, not in {TWO}" in notes


def test_of_a_tensor_in_two_shards_the_last_one_counts_if_the_index_says_so(tmp_path: Path) -> None:
    where, notes = found(indexed(tmp_path, {"a": ONE, "b": TWO}, **{ONE: "a b", TWO: "b"}))
    assert where == {"a": ONE, "b": TWO}
    assert notes == f"{TWO}: tensor 'b' is also in {ONE}, and not read from there"


# -- two checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_index", [True, False])
def test_two_complete_checkpoints_are_both_named(with_index: bool, tmp_path: Path) -> None:
    write_tensors(tmp_path / MODEL, "a", "b")
    for name, tensor in ((ONE, "a"), (TWO, "b")):
        write_tensors(tmp_path / name, tensor)
    if with_index:
        write_index(tmp_path, {"a": ONE, "b": TWO})
    other = f"{INDEX} with its 2 files" if with_index else ONE
    says = (f"holds two checkpoints, {MODEL} and {other}", "transformers reads the first", f"give {tmp_path / MODEL}")
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))
    fails(CheckpointError, says, lambda: Checkpoint.open_chosen([tmp_path / MODEL]))
    assert Checkpoint.open(tmp_path / MODEL).notes == ()


def test_an_index_without_its_shards_gives_way_to_the_file_beside_it(tmp_path: Path) -> None:
    write_tensors(tmp_path / MODEL, "new")
    write_index(tmp_path, {"old": ONE, "older": TWO})
    where, notes = found(tmp_path)
    assert where == {"new": MODEL}
    assert f"{INDEX} is not complete, and not read: {INDEX}: names {ONE}, which is not in the folder" in notes
    assert notes.endswith("(2 problems in all)")


def test_an_index_without_one_of_its_shards_gives_way_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / MODEL, "new")
    where, notes = found(indexed(tmp_path, {"old": ONE, "older": TWO}, **{TWO: "older"}))
    assert where == {"new": MODEL}
    assert f"{MODEL} is read, and not {TWO}" in notes


def test_a_file_that_is_cut_off_gives_way_to_an_index_with_all_its_shards(tmp_path: Path) -> None:
    write_raw(tmp_path / MODEL, b"{", declared=1000)
    where, notes = found(indexed(tmp_path, {"a": ONE, "b": TWO}, **{ONE: "a", TWO: "b"}))
    assert where == {"a": ONE, "b": TWO}
    assert f"{MODEL} is not complete, and not read: {MODEL}: header declares 1,000 bytes" in notes


def test_of_two_checkpoints_that_are_not_complete_all_problems_are_told(tmp_path: Path) -> None:
    write_raw(tmp_path / MODEL, b"{", declared=1000)
    write_index(tmp_path, {"a": ONE})
    fails(CheckpointError, (f"{MODEL}: header declares", f"names {ONE}, which is"), lambda: Checkpoint.open(tmp_path))


def test_numbered_files_that_are_not_all_there_give_way_to_a_single_one(tmp_path: Path) -> None:
    write_tensors(tmp_path / MODEL, "a")
    write_tensors(tmp_path / ONE, "a")
    where, notes = found(tmp_path)
    assert where == {"a": MODEL}
    assert f"{TWO}: missing from the folder" in notes


def test_an_index_that_names_the_single_file_is_its_index(tmp_path: Path) -> None:
    assert found(indexed(tmp_path, {"a": MODEL}, **{MODEL: "a"})) == ({"a": MODEL}, "")


def test_a_stale_index_beside_another_complete_set_is_named_as_what_is_in_the_way(tmp_path: Path) -> None:
    indexed(tmp_path, {"a": "model-00001-of-00007.safetensors"}, **{ONE: "a", TWO: "b"})
    says = ("names model-00001-of-00007", f"{ONE} and the 1 numbered like it are complete", "remove the index")
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    "other", ["consolidated.safetensors", "model.fp16.safetensors", "model.fp32-00001-of-00002.safetensors"]
)
def test_files_that_are_not_read_are_named(other: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / other, "x")
    write_tensors(tmp_path / MODEL, "a")
    assert found(tmp_path) == ({"a": MODEL}, f"{MODEL} is read, and not {other}, which other readers may take, too")
    (tmp_path / MODEL).rename(tmp_path / ONE)
    assert found(write_index(tmp_path, {"a": ONE})) == (
        {"a": ONE},
        f"{INDEX} is read, and not {other}, which it does not name",
    )


# -- what a reader has chosen -----------------------------------------------------------------------------------------


def test_what_a_reader_has_chosen_is_read_as_its_folder_where_that_is_the_same(tmp_path: Path) -> None:
    indexed(tmp_path, {"a": ONE, "b": TWO, "c": TWO}, **{ONE: "a", TWO: "b"})
    assert Checkpoint.open_chosen([tmp_path / TWO, tmp_path / ONE]).notes == Checkpoint.open(tmp_path).notes != ()


def test_a_variant_that_a_reader_has_chosen_is_read_for_itself(tmp_path: Path) -> None:
    write_tensors(tmp_path / MODEL, "a")
    write_tensors(tmp_path / "model.fp16.safetensors", "b")
    checkpoint = Checkpoint.open_chosen([tmp_path / "model.fp16.safetensors"])
    assert (set(checkpoint.tensors), checkpoint.notes) == ({"b"}, ())
