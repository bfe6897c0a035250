"""Faults of the machine at every call of an operation, and what becomes of them.

    python tests/faults/injector/_cases.py SHIM FOLDER OPERATION CHOSEN ...

runs in a process that was started with the shim, which `run_cases` does; it prints one JSON object a case. A case is
right if the operation gives the right result, or one `OctavoError` that says what failed and where, after which the
same operation, undisturbed, gives the right result. Neither leaves anything behind: files, threads, descriptors, locks.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _shim import Shim

#: kind of call -> how it may go wrong, the most telling one first; more than one name says that it does so from then on
FAULTS: dict[str, tuple[str, ...]] = {
    "open": ("EMFILE", "EIO", "EINTR", "ESTALE", "ENFILE", "EACCES", "ENOSPC", "EROFS", "ENOMEM", "ENOENT", "EMFILE+"),
    "read": ("EIO", "short", "zero", "EINTR", "ESTALE", "EIO+", "short+"),
    "write": ("ENOSPC", "short", "EINTR", "EIO", "EDQUOT", "ESTALE", "EFBIG", "ENOSPC+", "short+"),
    "sync": ("EIO", "EINTR", "ENOSPC", "EDQUOT", "EIO+"),
    "close": ("after EIO", "after EINTR", "after ENOSPC", "after EDQUOT"),
    "rename": ("EXDEV", "EIO", "ENOSPC", "EROFS", "ESTALE", "EACCES", "EBUSY", "after EIO", "EXDEV+"),
    "stat": ("EIO", "ESTALE", "EACCES", "ENOMEM", "ESTALE+"),
    "mkdir": ("EROFS", "ENOSPC", "EACCES", "EIO", "EMLINK"),
    "unlink": ("EIO", "EROFS", "EACCES", "EBUSY", "after EIO", "EROFS+"),
    "allocate": ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EINTR", "EOPNOTSUPP"),
    "lock": ("ENOLCK", "EWOULDBLOCK", "EINTR", "EIO", "ENOSYS"),
    "list": ("EIO", "ESTALE", "EACCES", "EMFILE"),
    "map": ("ENOMEM", "EACCES", "ENODEV"),
    "thread": ("EAGAIN", "EAGAIN+"),
    "memory": ("ENOMEM", "ENOMEM+"),
}
#: said in other words than the system's
_OWN_WORDS = {"EAGAIN", "EWOULDBLOCK"}
_FULL = {"ENOSPC", "EDQUOT"}
#: one thread, so that calls come in the same order every time
OPTIONS: dict[str, Any] = {"threads": 1, "staging_bytes": 1 << 20}
_FOR_EVER = 1 << 40
_QUICK_CALLS = 6


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the n-th call of a kind."""

    kind: str
    name: str  # as in `FAULTS`
    nth: int

    @property
    def error(self) -> str:
        """The name of the errno, or that of the way in which the call misbehaves without one."""
        return self.name.removesuffix("+").removeprefix("after ")

    @property
    def code(self) -> int:
        return getattr(errno, self.error, 0)

    @property
    def way(self) -> str:
        return "after" if self.name.startswith("after") else "before" if self.code else self.error

    @property
    def times(self) -> int:
        return _FOR_EVER if self.name.endswith("+") else 1


# -- what is disturbed ------------------------------------------------------------------------------------------------


class Operation:
    """Something that octavo does, with all that belongs to it below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = root / "source"
        self.right: Any = None

    def prepare(self) -> None:
        """Make the state that the operation begins with."""

    def run(self) -> Any:
        """The operation."""
        raise NotImplementedError

    def result(self, returned: Any) -> Any:
        """What came of it, in a form that is equal to another's."""
        return returned

    def clean(self) -> None:
        """Remove what the operation made."""

    def left(self, returned: Any) -> list[str]:
        """What lies about that should not."""
        return sorted({path.name for path in self.root.iterdir()} - {"source", "out", "made"})


class Convert(Operation):
    """A conversion of two shards, one of which is large enough to be written past the page cache."""

    def run(self) -> Any:
        import octavo

        return octavo.convert(self.source, self.root / "out", **OPTIONS)

    def left(self, returned: Any) -> list[str]:
        told = " ".join(returned.notes)  # what could not be removed is said
        return [name for name in super().left(returned) if f"{self.root / name} could not be removed" not in told]

    def result(self, returned: Any) -> Any:
        return {path.name: path.read_bytes() for path in (self.root / "out").iterdir()}

    def clean(self) -> None:
        for path in self.root.iterdir():
            if path.name not in ("source", "made"):
                shutil.rmtree(path)


class Resume(Convert):
    """The same, when an earlier run has finished one shard."""

    def prepare(self) -> None:
        import octavo

        def progress(done: int, of: int) -> None:
            if done * 2 > of:
                raise InterruptedError

        with contextlib.suppress(InterruptedError):
            octavo.convert(self.source, self.root / "out", progress=progress, **OPTIONS)
        assert (self.root / "out.partial").exists()


class Verify(Operation):
    """A verification of what a conversion wrote."""

    def __init__(self, root: Path) -> None:
        import octavo

        super().__init__(root)
        octavo.convert(self.source, root / "made")

    def run(self) -> Any:
        import octavo

        return octavo.verify(self.root / "made", self.source)

    def result(self, returned: Any) -> Any:
        return returned.to_dict()


class Stream(Operation):
    """Iterating over the FP8 checkpoint."""

    def run(self) -> Any:
        import octavo

        return dict(octavo.stream(self.source, **OPTIONS))

    def result(self, returned: Any) -> Any:
        return _bytes_of(returned)


class Plan(Operation):
    """Planning a conversion."""

    def run(self) -> Any:
        import octavo

        return octavo.plan(self.source, model=False)

    def result(self, returned: Any) -> Any:
        return returned.to_dict()


class Load(Operation):
    """Loading a transformers model."""

    def run(self) -> Any:
        import octavo

        return octavo.load(self.source, **OPTIONS)

    def result(self, returned: Any) -> Any:
        return _bytes_of(returned.state_dict())


OPERATIONS = {cls.__name__.lower(): cls for cls in (Convert, Resume, Verify, Stream, Plan, Load)}


def _bytes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[str, list[int]]]:
    import torch

    return {name: (str(t.dtype), t.reshape(-1).view(torch.uint8).tolist()) for name, t in tensors.items()}


def make_source(folder: Path, operation: str) -> None:
    """A small checkpoint in two shards."""
    import torch

    from helpers import random_weights, write_checkpoint

    if operation == "load":
        from helpers.folders import split_shards
        from helpers.models import random_model

        sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        model = random_model("LlamaConfig", {**sizes, "num_attention_heads": 2, "num_key_value_heads": 1})
        model.save_pretrained(folder)
        split_shards(folder, folder, lambda name: "mlp" in name, 2)
        return
    shapes = {"0.mlp.up_proj": (544, 512), "0.input_layernorm": (64,), "1.mlp.up_proj": (64, 96), "1.q_proj": (8, 96)}
    tensors = {
        f"model.layers.{name}.weight": random_weights(shape, torch.bfloat16, seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    write_checkpoint(folder, tensors, 2, {"model_type": "llama", "hidden_size": 512})
    (folder / "tokenizer.json").write_text("{}")


# -- cases ------------------------------------------------------------------------------------------------------------


class Disturber:
    """Runs one operation under one fault after another."""

    def __init__(self, shim: Shim, operation: Operation) -> None:
        self._shim, self._operation = shim, operation
        self._noise: list[str] = []  # errors that reached no caller
        sys.unraisablehook = lambda found: self._noise.append(f"unraisable {found.exc_value!r} in {found.object!r}")
        threading.excepthook = lambda found: self._noise.append(f"in {found.thread}: {found.exc_value!r}")
        operation.prepare()
        operation.run()  # opens what stays open, imports what is imported late
        operation.clean()
        operation.prepare()
        with shim.armed(operation.root, None):
            returned = operation.run()
        self._right, self.counts = operation.result(returned), shim.counts()
        operation.clean()

    def run(self, fault: Fault) -> dict[str, Any] | None:
        """The outcome of one case; None if there is no such call."""
        operation, self._noise[:] = self._operation, []
        operation.prepare()
        before = _possessions()
        outcome, text, problems, returned = "right", "", [], None
        with self._shim.armed(operation.root, fault.kind, fault.way, fault.code, fault.nth, fault.times):
            try:
                returned = operation.run()
            except BaseException as error:
                outcome, text = type(error).__name__, str(error)
                problems += _complaints(error, fault, operation.root)
        struck = self._shim.struck
        if outcome == "right" and operation.result(returned) != self._right:
            problems.append("a wrong result, and no error")
        if (after := _possessions()) != before:
            problems.append(f"left open or running: {sorted(set(after) - set(before))}, {len(before)} -> {len(after)}")
        problems += self._noise
        if outcome == "right":
            problems += [f"left behind: {name}" for name in operation.left(returned)]
        else:
            problems += self._again()
        operation.clean()
        if not struck:
            assert outcome == "right", (fault, text)
            return None
        where = struck.replace(str(operation.root), "")
        return {**vars(fault), "call": where, "outcome": outcome, "text": text, "problems": problems}

    def _again(self) -> list[str]:
        """What is wrong with the same operation, undisturbed, after one that failed."""
        operation = self._operation
        if (operation.root / "out").exists():
            return ["failed, and left a result"]
        try:
            returned = operation.run()
        except BaseException as error:
            return [f"the same again: {error!r}"]
        problems = [f"the same again left {name}" for name in operation.left(returned)]
        return problems + ["the same again: a wrong result"] * (operation.result(returned) != self._right)


def _possessions() -> list[str]:
    """Open descriptors and running threads."""
    found = [f"thread {thread.name}" for thread in threading.enumerate()]
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of this very listing
            found.append(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
    return sorted(found)


def _complaints(error: BaseException, fault: Fault, root: Path) -> list[str]:
    """What is wrong with an error's class and words."""
    import octavo

    text = str(error)
    if not isinstance(error, octavo.OctavoError):
        return [f"not octavo's error: {error!r}"]
    found = []
    if str(root) not in text and fault.kind not in ("thread", "memory"):
        found.append("does not say where")
    if fault.code and os.strerror(fault.code) not in text and fault.error not in _OWN_WORDS:
        found.append("does not say what")
    if "None" in text:
        found.append("says None")
    if "make room" in text.lower() and fault.error not in _FULL:
        found.append("wrong advice")
    return found


def cases(shim: Shim, operation: Operation, chosen: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every fault that is chosen, at every call.

    Args:
        chosen: ``full``, kinds of call, and faults as ``kind:name``; ``quick`` for the first of each kind, at no more
            than half a dozen calls of a kind.
    """
    disturber = Disturber(shim, operation)
    yield {"counts": disturber.counts}
    for kind, names in FAULTS.items():
        step = 1 + disturber.counts[kind] // _QUICK_CALLS if "quick" in chosen else 1
        for name in names[: 1 if "quick" in chosen else None]:
            if not {"quick", "full", kind, f"{kind}:{name}"} & {*chosen}:
                continue
            # one more than there are, to see that the last was reached
            for nth in range(1, disturber.counts[kind] + 2, step):
                found = disturber.run(Fault(kind, name, nth))
                if found is not None:
                    yield found


def run_cases(shim: Path, folder: Path, operation: str, *chosen: str) -> list[dict[str, Any]]:
    """What came of each case, from a process of its own; the first tells how many calls of each kind there are."""
    command = [sys.executable, __file__, str(shim), str(folder), operation, *chosen]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "LD_PRELOAD": str(shim)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(shim: str, folder: str, name: str, *chosen: str) -> None:
    os.environ.pop("LD_PRELOAD")
    root = Path(folder) / name
    make_source(root / "source", name)
    for case in cases(Shim(shim), OPERATIONS[name](root), chosen):
        print(json.dumps({"operation": name, **case}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
