"""``DST.partial`` as an earlier run, or somebody else, left it: the conversion goes on with it, or refuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import octavo

from ..jsontext import Object, tree_of
from ..mutator import Words
from .base import Target, shard_bytes

_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_ENTRIES = (
    *_SHARDS,
    *(f"{shard}.part" for shard in _SHARDS),
    "config.json",
    "model.safetensors.index.json",
    "notes.txt",
)
_KINDS = ("finished", "torn", "empty", "text", "link", "dangling", "pipe", "folder")
_CONTENT = b"what belongs to somebody else"


class Manifests(Target):
    """``{"lock": kind, "manifest": tree or kind, "checkpoint": {entry: kind}, "beside": {entry: kind}}`` as JSON.

    The text ``@key`` in a manifest stands for what a sound one has there, which is of this machine and run.
    """

    name = "manifests"
    share = 5
    words = Words(
        keys=(*("lock", "manifest", "checkpoint", "beside", "files", "finished", "source", "recipe"), *_ENTRIES),
        texts=(
            *_ENTRIES,
            *_KINDS,
            "mark",
            "octavo.lock",
            "manifest.json",
            "manifest.json.part",
            "@files",
            "@source",
            "..",
        ),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.source, self.dst = folder / "source", folder / "dst"
        self.partial, self.foreign = folder / "dst.partial", folder / "foreign"
        self.source.mkdir()
        for number, shard in enumerate(_SHARDS):
            tensors = {f"model.layers.{number}.up.weight": ("BF16", [4, 32], 256), f"n.{number}": ("F32", [2], 8)}
            (self.source / shard).write_bytes(shard_bytes(tensors))
        (self.source / "config.json").write_text("{}")
        self.foreign.write_bytes(_CONTENT)
        self.sound, self.mark = self._interrupted()
        self._convert()
        self.expected = _contents(self.dst)
        self.tidy()

    def run(self, data: bytes) -> None:
        try:
            scene = json.loads(data)
            json.dumps(scene)  # as it will be written
        except (ValueError, RecursionError):
            scene = {"manifest": data.decode("utf-8", "replace")}
        self._place(scene if isinstance(scene, dict) else {"manifest": scene})
        before = _contents(self.source)
        try:
            self._convert()
            assert _contents(self.dst) == self.expected, "the result is wrong"
            assert not os.path.lexists(self.partial), "the partial folder is left"
        finally:
            assert self.foreign.read_bytes() == _CONTENT, "another's file was changed"
            assert _contents(self.source) == before, "the source was changed"

    def tidy(self) -> None:
        for path in (self.dst, self.partial):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def repaired(self, tree: Any, random: Random) -> Any:
        """Half of the scenes have a folder that is octavo's, and a manifest that fits it but for one thing."""
        if isinstance(tree, Object) and random.random() < 0.5:
            tree.set("lock", "mark")
            if random.random() < 0.5:
                tree.set("manifest", tree_of({key: f"@{key}" for key in self.sound}))
        return tree

    # -- the state of a folder ----------------------------------------------------------------------------------------

    def _convert(self) -> None:
        octavo.convert(self.source, self.dst, threads=1, progress=False)

    def _interrupted(self) -> tuple[dict[str, Any], bytes]:
        """The manifest and the mark of a conversion that was stopped."""

        class StopError(Exception):
            pass

        def stop(*_: Any) -> None:
            raise StopError

        with contextlib.suppress(StopError):
            octavo.convert(self.source, self.dst, threads=1, progress=stop)
        manifest = json.loads((self.partial / "manifest.json").read_text())
        mark = (self.partial / "octavo.lock").read_bytes()
        self.tidy()
        return manifest, mark

    def _place(self, scene: dict[str, Any]) -> None:
        self.partial.mkdir()
        result = self.partial / "checkpoint"
        result.mkdir()
        if "lock" in scene:
            self._entry(self.partial / "octavo.lock", scene["lock"])
        if "manifest" in scene:
            self._manifest(self.partial / "manifest.json", scene["manifest"])
        for folder, key in ((result, "checkpoint"), (self.partial, "beside")):
            entries = scene.get(key)
            for name, kind in list(entries.items() if isinstance(entries, dict) else ())[:8]:
                with contextlib.suppress(OSError, ValueError):
                    if (folder / name).parent == folder and not os.path.lexists(folder / name):
                        self._entry(folder / name, kind)

    def _manifest(self, file: Path, given: Any) -> None:
        if isinstance(given, str) and given in _KINDS:
            self._entry(file, given)
            return
        text = given if isinstance(given, str) else json.dumps(given)
        for key, value in self.sound.items():
            text = text.replace(f'"@{key}"', json.dumps(value))
        file.write_bytes(text.encode("utf-8", "replace"))

    def _entry(self, path: Path, kind: Any) -> None:
        if kind == "mark":
            path.write_bytes(self.mark)
        elif kind == "finished":
            path.write_bytes(self.expected.get(path.name, b""))
        elif kind == "torn":
            path.write_bytes(self.mark[:40] if path.name == "octavo.lock" else bytes(99))
        elif kind == "link":
            path.symlink_to(self.foreign)
        elif kind == "dangling":
            path.symlink_to(self.folder / "nothing")
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.write_bytes(b"" if kind == "empty" else str(kind).encode("utf-8", "replace"))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
