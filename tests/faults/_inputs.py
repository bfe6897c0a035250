"""Broken checkpoints: safetensors files written byte by byte, and edits of a sound tiny model's folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.folders import split_shards
from octavo import OctavoError

INDEX = "model.safetensors.index.json"
MODEL = "model.safetensors"


# -- files ------------------------------------------------------------------------------------------------------------


def entry(dtype: Any = "BF16", shape: Any = (2, 3), begin: Any = 0, end: Any = 12, **more: Any) -> dict[str, Any]:
    """A header entry; sound as it stands, for one tensor of twelve bytes."""
    shape = list(shape) if isinstance(shape, tuple) else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


def write_raw(path: Path, header: bytes, data: bytes = b"", declared: int | None = None) -> Path:
    """Length field, header, data; ``declared`` overrides the length field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header) if declared is None else declared) + header + data)
    return path


def write_entries(path: Path, entries: Mapping[str, Any], data_bytes: int) -> Path:
    """A file with this header, whose data region is a hole of ``data_bytes``: no weight byte exists to be read."""
    write_raw(path, json.dumps(entries).encode())
    os.truncate(path, path.stat().st_size + data_bytes)
    return path


def write_tensors(path: Path, *names: str) -> Path:
    """A sound file with one small tensor a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(2, 3, dtype=torch.bfloat16) for name in names}, path)
    return path


def write_index(folder: Path, weight_map: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


# -- edits of a sound model -------------------------------------------------------------------------------------------


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def edit_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def split_in_two(folder: Path) -> Path:
    """Turn a single-file checkpoint into two shards and an index: attention in the first, all else in the second."""
    return split_shards(folder, folder, lambda name: "self_attn" not in name, 2)


# -- expectations -----------------------------------------------------------------------------------------------------


def fails(error: type[OctavoError], says: str | Iterable[str], call: Callable[[], Any]) -> str:
    """Assert that ``call`` raises exactly this class and that its text holds all of ``says``; returns the text."""
    with pytest.raises(OctavoError) as caught:
        call()
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {caught.value}"
    text = str(caught.value)
    for part in [says] if isinstance(says, str) else says:
        assert re.search(re.escape(part), text), f"{part!r} is not in:\n{text}"
    return text
