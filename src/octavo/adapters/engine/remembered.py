"""Surveys that are remembered from one start of an engine to the next, in the user's cache folder.

A fleet starts again and again with the same checkpoint, on the same code, with the same settings. What its dry runs
have shown is kept under a name that is made of all that it depends on (see `facts`), and used once the model that was
made is known to be like the one that was asked, and no other code to have come in between. Where anything differs, or
is odd, all is done as if nothing were remembered, and remembered anew.

Not remembered is a start of which a dry run has left something in the model that nobody could do again: see `left`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.files import conforms
from ..remembering import entries, facts
from .left import Calls, Left, Load, digest_of
from .record import Record
from .survey import Survey

#: raise it where the same words come to mean something else
_FORM = 2


@dataclass(frozen=True)
class Entry:
    """What is kept of one start."""

    config: Mapping[str, Any]  # a ``quantization_config``
    kept: Mapping[str, str]  # layers with which the model was made unquantized -> why
    namings: Sequence[int | None]  # of stacks of experts
    model: str  # digest of the facts of the model
    left: Mapping[str, Any]  # by the loader in the model, while it ran dry; see `Left`
    survey: Mapping[str, Any]  # see `Record`
    imported: Mapping[str, Any]  # files, after the load, and their states; see `facts`

    def __post_init__(self) -> None:
        kinds = {
            "config": dict[str, Any],
            "kept": dict[str, str],
            "namings": list[int | None],
            "model": str,
            "left": dict[str, Any],
            "survey": dict[str, Any],
            "imported": dict[str, list[int] | None],
        }
        for name, kind in kinds.items():
            if not conforms(getattr(self, name), kind):
                raise ValueError(f"no valid {name}")


def remembering(
    checkpoint: Checkpoint, about: Iterable[str], depends: Callable[[], str], log: logging.Logger
) -> Memory | None:
    """The memory of loads of a checkpoint with settings that are described by words; None where these can't be had."""
    try:
        return Memory([facts.of_checkpoint(checkpoint), *about, depends()], log)
    except Exception as error:  # of objects of others that are looked at
        log.info("octavo: the plan can't be remembered: %s: %s", type(error).__name__, error)
        return None


class Memory:
    """The entry of one start, if there is one; and how to make it.

    Args:
        depends: words for all that a survey depends on, but for code.
        log: of what can't be remembered.
    """

    def __init__(self, depends: Iterable[str], log: logging.Logger) -> None:
        self._log = log
        self._imported = facts.imported()
        files = facts.states(self._imported | facts.octavos())
        self._path = entries.path_of(facts.digest(str(_FORM), facts.of_versions(), repr(files), *depends))

    def recall(self) -> Entry | None:
        """What an earlier start has kept, if no code has changed since."""
        try:
            entry = Entry(**entries.read(self._path))
            if _listed(facts.states(entry.imported)) != entry.imported:
                raise ValueError("other code than then")
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever comes of files that were written by who knows whom
            self._log.info("octavo: the plan in %s can't be used, and is made anew (%s)", self._path, error)
            return None
        return entry

    def restore(self, entry: Entry, record: Record, load: Load, calls: Calls) -> Survey:
        """The survey; with what the loader has left in a model.

        Raises:
            ValueError: it is not one of this model, or there is code that its start did not have.
            Exception: whatever comes of what is not as it was written.
        """
        new = _listed(facts.states(facts.imported() - self._imported))
        if not new.items() <= entry.imported.items():
            raise ValueError("other code than then")
        if digest_of(facts.of_model(record.model)) != entry.model:
            raise ValueError("another model")
        found = record.read(entry.survey)
        Left(**entry.left).restore(record.model, load, calls)
        return found

    def keep(self, entry: Entry) -> None:
        """Keep what a load has shown; what goes wrong is only told."""
        try:
            entry = dataclasses.replace(entry, imported=_listed(facts.states(facts.imported() - self._imported)))
            entries.keep(self._path, vars(entry))
        except Exception as error:  # whatever it is, the model is loaded
            self._log.info("octavo: the plan can't be remembered: %s: %s", type(error).__name__, error)


def _listed(files: facts.Files) -> dict[str, Any]:
    """As JSON has it."""
    return {file: state and list(state) for file, state in files.items()}
