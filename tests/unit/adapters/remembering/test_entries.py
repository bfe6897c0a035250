"""What is in the folder of entries is read only as far as it may be one."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from octavo.adapters.remembering import entries


def test_what_is_larger_than_any_entry_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / ("0" * 64)
    entries.write(path, {"a": 1})
    assert entries.read(path) == {"a": 1}
    os.truncate(path, entries._MAX_ENTRY_BYTES + 1)  # a hole, which takes no room
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than are ever written"):
        entries.read(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
