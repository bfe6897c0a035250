"""What users write on the command line, or pass to a function, where a text or number is wanted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import octavo
from octavo.cli_options import check_size
from octavo.machine import usable_device

from ..mutator import Words
from .base import Target, shard_bytes


class Options(Target):
    """An object of options, as JSON."""

    name = "options"
    share = 5
    words = Words(
        keys=("size", "device", "format", "staging_bytes", "threads", "path", "ignore", "scheme"),
        texts=(
            *("256MiB", "24GiB", "80GB", "1.5T", "auto", "1e9", "cpu", "cpu:0", "cuda", "cuda:1", "meta", "xpu", "mps"),
            *(
                "mtia",
                "hpu",
                "privateuseone",
                "lazy",
                "compressed-tensors",
                "fp8",
                "~",
                "~nosuchuser/x",
                "/dev/null",
                "./a",
            ),
            *("../model.safetensors", "model.safetensors/x", "/proc/self/mem", "*.up", "re:.*", "fp8_block", "mxfp8"),
        ),
        numbers=("1048576", "1048575", "16"),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = folder / "model.safetensors"
        self.model.write_bytes(shard_bytes({"model.layers.0.up.weight": ("BF16", [4, 32], 256)}))

    def run(self, data: bytes) -> None:
        try:
            given = json.loads(data)
        except (ValueError, RecursionError):
            return
        if not isinstance(given, dict):
            return
        if isinstance(size := given.get("size"), str):
            check_size(size)
        if isinstance(device := given.get("device"), str):
            usable_device(device)
        chosen: dict[str, Any] = {
            key: given[key] for key in ("format", "staging_bytes", "ignore", "scheme") if key in given
        }
        octavo.plan(self._path(given.get("path")), model=False, **chosen).to_dict()
        if "threads" in given:
            dict(octavo.stream(self.model, threads=given["threads"]))

    def _path(self, given: Any) -> str | Path:
        """A path; not one that could be meant for the hub."""
        if isinstance(given, str) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?\n?", given):
            return given
        return self.model
