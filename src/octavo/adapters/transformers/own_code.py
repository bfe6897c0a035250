"""Code that a checkpoint brings or names: none of it is run, fetched or copied unless the user trusts it.

transformers is always told yes or no, since on None it asks on stdin. What it asks for deeper down, where nobody can
tell it, is taken out of its sight: see `hidden`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.integrations.hub_kernels import is_kernel

from ...checkpoint.files import read_object
from ...errors import CheckpointError

_ADVICE = (
    "None of it was run. Read it, and pass trust_remote_code=True (on the command line, --trust-remote-code) if you "
    "trust it."
)
#: what transformers says where it would have to run code: of the checkpoint, and of a part whose code is `hidden`
_REFUSED = ("trust_remote_code", "Unrecognized configuration class")


def refusal(error: Exception, folder: str, file: str) -> CheckpointError | None:
    """The error for a checkpoint that can't do without code of its own; None where ``error`` is about something else.

    Args:
        error: what transformers has raised without that code.
        file: the JSON file of the folder that names the code.
    """
    if not any(words in str(error) for words in _REFUSED):
        return None
    with contextlib.suppress(CheckpointError):
        if named := ", ".join(dict.fromkeys(_named(read_object(Path(folder, file), unique=False)))):
            return CheckpointError(f"{folder}/{file}: needs code that the checkpoint brings ({named}). {_ADVICE}")
    return None


def _named(config: Any) -> Iterator[str]:
    """The files of code that a config names, at whatever depth; those of other repositories with theirs."""
    left = [config]
    while left:
        found = left.pop()
        if isinstance(found, dict):
            left += found.values()
            classes = [found.get("auto_map")]
            while classes:
                named = classes.pop(0)
                if isinstance(named, str):
                    repository, _, name = named.rpartition("--")
                    yield f"{name.rpartition('.')[0]}.py" + (f" of {repository}" if repository else "")
                elif isinstance(named, (dict, list)):
                    classes += named.values() if isinstance(named, dict) else named
        elif isinstance(found, list):
            left += found


@contextlib.contextmanager
def hidden(config: Any) -> Iterator[None]:
    """Meanwhile the configs within a config name no code.

    Models build their parts by ``AutoModel.from_config(config.part)``, without passing on whether code is trusted.
    """
    parts = [part for part in _configs(config) if part is not config and "auto_map" in vars(part)]
    taken = [(part, vars(part).pop("auto_map")) for part in parts]
    try:
        yield
    finally:
        for part, auto_map in taken:
            part.auto_map = auto_map


def refuse_kernels(config: Any, folder: str) -> None:
    """Raise for a config that names kernels of the hub, which transformers would fetch and run.

    Raises:
        CheckpointError: naming them.
    """
    for part in _configs(config):
        for implementation in (part._attn_implementation, part._experts_implementation):
            if isinstance(implementation, str) and is_kernel(implementation):
                raise CheckpointError(
                    f"{folder}/config.json: needs code from the hub, the kernel {implementation}. {_ADVICE} Or choose "
                    "attn_implementation yourself."
                )


def _configs(config: Any) -> Iterator[Any]:
    """A config, and all configs within it."""
    left, seen = [config], set()
    while left:
        found = left.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, transformers.PreTrainedConfig):
            yield found
            left += vars(found).values()
        elif isinstance(found, dict):
            left += found.values()
        elif isinstance(found, (list, tuple)):
            left += found
