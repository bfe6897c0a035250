"""Folders of sentence-transformers: a model, and in folders beside it what follows on it, such as pooling.

modules.json    [{"idx": 0, "path": "", ...}, {"idx": 1, "path": "1_Pooling", ...}, {"idx": 2, "path": "2_Dense"}]
"""

from __future__ import annotations

import contextlib
from pathlib import Path, PurePosixPath
from typing import Any

from .files import MAX_CONFIG_BYTES, parse_json, read_bounded

MODULES_NAME = "modules.json"


def module_folders(folder: Path) -> list[str]:
    """The folders below that modules.json names, itself left out; none where there is no such file.

    It is others' file, and a name that many use: one of another form names nothing. Paths may lead anywhere.
    """
    value: Any = None
    with contextlib.suppress(OSError, ValueError):
        value = parse_json(read_bounded(folder / MODULES_NAME, MAX_CONFIG_BYTES), unique=False)
    entries = value if isinstance(value, list) else []
    paths = (entry.get("path") for entry in entries if isinstance(entry, dict))
    named = (str(PurePosixPath(path)) for path in paths if isinstance(path, str) and "\0" not in path)
    return list(dict.fromkeys(path for path in named if path != "."))


def leads_out(path: str) -> bool:
    """Return True for a path that leaves the folder which it is relative to."""
    return PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts
