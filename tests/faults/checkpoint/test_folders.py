"""Folders, indices and shard sets that don't fit together: `Checkpoint.open` names the files, and opens no pickle."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _inputs import INDEX, MODEL, entry, fails, write_entries, write_index, write_tensors

from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import CheckpointError, MissingExtraError

pytestmark = pytest.mark.usefixtures("no_weight_is_read")

ONE, TWO, THREE = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))


def _files(**contents: bytes | str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return build


def _shards(**tensors: str) -> Callable[[Path], None]:
    """File name -> names of its tensors, separated by spaces."""

    def build(folder: Path) -> None:
        for name, names in tensors.items():
            write_tensors(folder / name, *names.split())

    return build


def _indexed(weight_map: Any, **tensors: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        _shards(**tensors)(folder)
        write_index(folder, weight_map)

    return build


def _raw_index(text: str | bytes) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        write_tensors(folder / ONE, "a")
        _files(**{INDEX: text})(folder)

    return build


def _directory(name: str, *others: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / name).mkdir()
        for i, other in enumerate(others):
            write_tensors(folder / other, f"t{i}")

    return build


def _dangling_link(folder: Path) -> None:
    write_tensors(folder / "model-00001-of-00002.safetensors", "a")
    (folder / "model-00002-of-00002.safetensors").symlink_to(folder / "blobs" / "absent")


#: case -> (what makes the folder, what the error says)
FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "an empty folder": (lambda folder: None, ("no .safetensors file here",)),
    "a folder with nothing but a config": (_files(**{"config.json": "{}"}), ("no .safetensors file here",)),
    "a folder of pickles": (
        _files(**{"pytorch_model.bin": b"\x80\x02", "config.json": "{}"}),
        ("no .safetensors file here", "pytorch_model.bin is a pickle, which can run code"),
    ),
    "a folder with a .pth": (_files(**{"consolidated.00.pth": b"\x80\x02"}), ("consolidated.00.pth is a pickle",)),
    "a folder of GGUF": (_files(**{"model-Q8_0.gguf": b"GGUF"}), ("no .safetensors file here", "GGUF holds already")),
    "several unrelated files": (
        _shards(**{"a.safetensors": "a", "b.safetensors": "b"}),
        ("2 .safetensors files", INDEX),
    ),
    "shards of two sets": (
        _shards(**{"model-00001-of-00002.safetensors": "a", ONE: "b"}),
        ("belong to several sets", INDEX),
    ),
    "the first shard of three": (_shards(**{ONE: "a"}), (TWO, THREE, "missing from the folder")),
    "a set without its second shard": (_shards(**{ONE: "a", THREE: "c"}), (TWO, "missing from the folder")),
    "two shards of billions": (
        _shards(**{"m-00001-of-99999999999.safetensors": "a", "m-00003-of-99999999999.safetensors": "b"}),
        ("m-00002-of-99999999999.safetensors: missing", "m-00051-of", "99,999,999,948 more are missing"),
    ),
    "a tensor in two shards": (
        _shards(**{ONE: "a b", TWO: "b", THREE: "c"}),
        (f"{TWO}: tensor 'b' is also in {ONE}",),
    ),
    "a tensor in two indexed shards, of which the index names the first": (
        _indexed({"a": ONE, "b": ONE, "c": TWO}, **{ONE: "a b", TWO: "b c"}),
        (f"{TWO}: tensor 'b' is also in {ONE}",),
    ),
    "an index that names an absent file": (
        _indexed({"a": ONE, "b": TWO, "c": TWO}, **{ONE: "a"}),
        (INDEX, f"names {TWO}, which is not in the folder (2 tensors are in it)"),
    ),
    "an index that leaves the folder": (
        _indexed({"a": ONE, "b": "../secret.safetensors"}, **{ONE: "a"}),
        ("'b' points to '../secret.safetensors', which is no .safetensors file of this folder",),
    ),
    "an index with an absolute path": (
        _indexed({"b": "/etc/secret.safetensors"}, **{ONE: "a"}),
        ("'b' points to '/etc/secret.safetensors'",),
    ),
    "an index into a folder below": (_indexed({"b": f"sub/{ONE}"}, **{ONE: "a"}), (f"'b' points to 'sub/{ONE}'",)),
    "an index of pickles": (
        _indexed({"a": "pytorch_model-00001-of-00001.bin"}),
        ("'a' points to 'pytorch_model-00001-of-00001.bin', which is no .safetensors file",),
    ),
    "an index with an empty file name": (_indexed({"a": ""}), ("'a' points to ''",)),
    "an index that is no JSON": (_raw_index("{weight_map"), (INDEX, "not valid JSON")),
    "an index that is no UTF-8": (_raw_index(b'{"weight_map": {"\xff": ""}}'), (INDEX, "not valid JSON")),
    "an index that is empty": (_raw_index(""), (INDEX, "not valid JSON")),
    "an index that is a list": (_raw_index("[]"), (INDEX, "not a JSON object")),
    "an index without a weight_map": (_raw_index('{"metadata": {}}'), (INDEX, "not a valid index", "weight_map")),
    "a weight_map that is empty": (_indexed({}, **{ONE: "a"}), (INDEX, "weight_map is empty")),
    "a weight_map that is a list": (_indexed([ONE]), (INDEX, "weight_map must map tensor names to file names")),
    "a weight_map with a number": (_indexed({"a": 1}), (INDEX, "weight_map must map tensor names to file names")),
    "a weight_map that names a tensor twice": (
        _raw_index(f'{{"weight_map": {{"a": "{ONE}", "a": "{TWO}"}}}}'),
        (INDEX, "the key 'a' appears twice"),
    ),
    "a directory in place of the model": (_directory(MODEL), (MODEL, "not a regular file")),
    "a directory in place of a shard": (_directory(TWO, ONE, THREE), (TWO, "not a regular file")),
    "a link to nothing in place of a shard": (_dangling_link, ("model-00002-of-00002.safetensors", "No such file")),
    "a config that is no JSON": (
        lambda folder: (write_tensors(folder / MODEL, "a"), _files(**{"config.json": "{,}"})(folder))[0],
        ("config.json", "not valid JSON"),
    ),
    "a config that is no UTF-8": (
        lambda folder: (write_tensors(folder / MODEL, "a"), _files(**{"config.json": b'{"\xff": 1}'})(folder))[0],
        ("config.json", "not valid JSON"),
    ),
    "a config that is a list": (
        lambda folder: (write_tensors(folder / MODEL, "a"), _files(**{"config.json": "[]"})(folder))[0],
        ("config.json", "not a JSON object"),
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folder_that_is_no_checkpoint_is_described(case: str, tmp_path: Path) -> None:
    build, says = FOLDERS[case]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    build(folder)
    fails(CheckpointError, (str(folder), *says), lambda: Checkpoint.open(folder))


def test_index_and_files_report_all_problems_at_once(tmp_path: Path) -> None:
    write_tensors(tmp_path / ONE, "a", "extra")
    write_entries(tmp_path / TWO, {"b": entry("BF17")}, 12)
    write_index(tmp_path, {"a": ONE, "gone": ONE, "b": TWO, "c": THREE, "d": "../d.safetensors"})
    says = (
        f"{TWO}: tensor 'b': unknown dtype",
        f"names {THREE}, which is not in the folder",
        "'d' points to '../d.safetensors'",
    )
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))


def test_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    path = tmp_path / "absent"
    fails(CheckpointError, (str(path), "no such file or folder"), lambda: Checkpoint.open(path))


def test_file_below_a_file_is_no_path(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / MODEL, "a") / "below"
    fails(CheckpointError, (str(path), "no such file or folder"), lambda: Checkpoint.open(path))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model.bin", "is a pickle"),
        ("model.pt", "is a pickle"),
        ("model.gguf", "GGUF holds"),
        ("model.txt", "Give a folder"),
    ],
)
def test_single_file_that_is_no_safetensors_is_refused_unopened(name: str, advice: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b"\x80\x02")
    fails(CheckpointError, (str(file), "not a .safetensors file", advice), lambda: Checkpoint.open(file))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
@pytest.mark.parametrize("which", [ONE, INDEX, "config.json"])
def test_file_without_permission_is_named(which: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / ONE, "a")
    write_index(tmp_path, {"a": ONE})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / which).chmod(0)
    fails(CheckpointError, (which, "Permission denied"), lambda: Checkpoint.open(tmp_path))


def _link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


#: what nobody can read, root neither -> what the system says of it
UNREADABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a folder": (Path.mkdir, "not a regular file"),
    "a named pipe": (os.mkfifo, "not a regular file"),
    "a device": (_link_to("/dev/zero"), "not a regular file"),
    "a link to nothing": (_link_to("absent"), "No such file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "a link through a file": (_link_to("plain/file"), "Not a directory"),
    "a link to a name that is too long": (_link_to("x" * 300), "File name too long"),
}


@pytest.mark.parametrize("which", [MODEL, INDEX, "config.json"])
@pytest.mark.parametrize("case", UNREADABLE)
def test_file_that_cannot_be_opened_is_named(case: str, which: str, tmp_path: Path) -> None:
    make, says = UNREADABLE[case]
    (tmp_path / "plain").touch()
    if which != MODEL:
        write_tensors(tmp_path / MODEL, "a")
    make(tmp_path / which)
    fails(CheckpointError, (str(tmp_path), which, says), lambda: Checkpoint.open(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reads fail")
@pytest.mark.parametrize("which", [MODEL, INDEX, "config.json"])
def test_file_whose_reads_fail_is_named(which: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "other.safetensors", "a")
    (tmp_path / which).symlink_to("/proc/self/mem")  # nothing is mapped where it begins
    fails(CheckpointError, (which, "Input/output error", "fetch it again"), lambda: Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("~no_such_user/x", "Could not determine home directory"),
        ("x" * 300, "File name too long"),
        ("a\0b", "without NUL characters"),
        (b"bytes", "paths are text"),
        (5, "not a path here"),
        (None, "not a path here"),
    ],
)
def test_what_can_be_no_path_is_named(path: Any, says: str) -> None:
    fails(CheckpointError, says, lambda: Checkpoint.open(path))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"a":' * 200_000, "nested too deeply"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested deeper than 64"),
        ('{"a": [' + "[" * 70 + "]" * 70 + "]}", "nested deeper than 64"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON: a number of 5,000 digits; at most 100 are taken"),
    ],
)
@pytest.mark.parametrize("which", [INDEX, "config.json"])
def test_json_beyond_its_bounds_is_refused(which: str, content: str, says: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / MODEL, "a")
    (tmp_path / which).write_text(content)
    fails(CheckpointError, (which, says), lambda: Checkpoint.open(tmp_path))


def test_json_is_not_parsed_until_the_stack_ends_however_far_a_program_lets_python_go(tmp_path: Path) -> None:
    write_tensors(tmp_path / MODEL, "a")
    config, before = tmp_path / "config.json", sys.getrecursionlimit()
    sys.setrecursionlimit(1 << 30)
    try:
        config.write_text('{"' + "\\\\[" * 900_000 + '": ' + "[" * 900_000 + "]" * 900_000 + "}")
        fails(CheckpointError, ("config.json", "nested too deeply"), lambda: Checkpoint.open(tmp_path))
        config.write_text('{"a": "' + "[" * 20_000 + '\\"' + "[" * 20_000 + '"}')
        assert len(Checkpoint.open(tmp_path).config["a"]) == 40_001
    finally:
        sys.setrecursionlimit(before)


@pytest.mark.parametrize(("which", "limit"), [(INDEX, 100_000_000), ("config.json", 16 << 20)])
def test_json_larger_than_its_bound_is_not_parsed(which: str, limit: int, tmp_path: Path) -> None:
    write_tensors(tmp_path / MODEL, "a")
    (tmp_path / which).touch()
    os.truncate(tmp_path / which, 1 << 40)
    says = (which, f"{1 << 40:,} bytes long; of such a file octavo reads at most {limit:,}")
    fails(CheckpointError, says, lambda: Checkpoint.open(tmp_path))


@pytest.mark.parametrize(
    ("quantization", "says"),
    [("[]", "quantization_config must be an object"), ('"fp8"', "must be"), ('{"quant_method": []}', "quant_method")],
)
def test_quantization_config_of_another_type_is_refused(quantization: str, says: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / MODEL, "a")
    (tmp_path / "config.json").write_text(f'{{"quantization_config": {quantization}}}')
    fails(CheckpointError, ("config.json", says), lambda: Checkpoint.open(tmp_path))


def test_directory_in_place_of_the_index_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / ONE, "a")
    (tmp_path / INDEX).mkdir()
    fails(CheckpointError, INDEX, lambda: Checkpoint.open(tmp_path))


def test_named_pipe_in_place_of_a_shard_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MODEL)
    raised: list[BaseException] = []

    def open_it() -> None:
        try:
            Checkpoint.open(tmp_path)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=open_it, daemon=True)
    thread.start()
    thread.join(2)
    if hung := thread.is_alive():  # let it go
        os.close(os.open(tmp_path / MODEL, os.O_WRONLY | os.O_NONBLOCK))
        thread.join()
    assert not hung
    assert [type(error) for error in raised] == [CheckpointError]


def test_hub_id_without_the_hub_client_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    fails(
        MissingExtraError, ("no-org/no-model", "pip install 'octavo[hub]'"), lambda: Checkpoint.open("no-org/no-model")
    )


def test_hub_id_that_the_hub_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", refuse)
    says = ("no-org/no-model", "no such file or folder", "ConnectionError: no route to host")
    fails(CheckpointError, says, lambda: Checkpoint.open("no-org/no-model"))


def test_hub_folder_without_safetensors_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path / "snapshot"))
    fails(CheckpointError, "no .safetensors file here", lambda: Checkpoint.open("no-org/no-model"))


def test_of_the_hub_s_pickles_only_those_of_modules_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    utils = pytest.importorskip("huggingface_hub.utils")
    there = ["model.safetensors", "pytorch_model.bin", "2_Dense/pytorch_model.bin", "original/consolidated.00.pth"]
    fetched: list[str] = []

    def download(_: str, allow_patterns: list[str], ignore_patterns: list[str], **__: Any) -> str:
        fetched.extend(utils.filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", download)
    write_tensors(tmp_path / MODEL, "a")
    Checkpoint.open("org/name")
    assert fetched == ["model.safetensors", "2_Dense/pytorch_model.bin"]


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_disk_that_does_not_answer_is_no_absent_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its config a converted checkpoint would not say that it is FP8."""
    write_tensors(tmp_path / MODEL, "a")
    (tmp_path / "config.json").write_text("{}")
    original = os.lstat

    def lstat(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith(name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path, **options)

    monkeypatch.setattr(os, "lstat", lstat)
    fails(CheckpointError, (name, os.strerror(errno.EIO)), lambda: Checkpoint.open(tmp_path))
