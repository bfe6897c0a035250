"""Surveys that are remembered from one start of an engine to the next, in the user's cache folder.

A fleet starts again and again with the same checkpoint, on the same code, with the same settings. What its dry runs
have shown is kept under a name that is made of all that it depends on (see `facts`), and used once the model that was
made is known to be like the one that was asked, and no other code to have come in between. Where anything differs, or
is odd, all is done as if nothing were remembered, and remembered anew.

Not remembered is what a dry run has left in a model otherwise than as weights, constants and plain attributes: nobody
could do the same again.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.files import conforms
from . import entries, facts
from .record import Record
from .survey import Survey

_PLAIN = (type(None), bool, int, float, str)
#: raise it where the same words come to mean something else
_FORM = 1

Attributes = list[list[Any]]  # [module, name, value]


@dataclass(frozen=True)
class Entry:
    """What is kept of one start."""

    config: Mapping[str, Any]  # a ``quantization_config``
    kept: Mapping[str, str]  # layers with which the model was made unquantized -> why
    namings: Sequence[int | None]  # of stacks of experts
    model: str  # digest of the facts of the model
    attributes: Attributes  # that the loader has set while it ran dry
    survey: Mapping[str, Any]  # see `Record`
    imported: Mapping[str, Any]  # files, after the load, and their states; see `facts`

    def __post_init__(self) -> None:
        kinds = {
            "config": dict[str, Any],
            "kept": dict[str, str],
            "namings": list[int | None],
            "model": str,
            "attributes": list[list[Any]],
            "survey": dict[str, Any],
            "imported": dict[str, list[int] | None],
        }
        for name, kind in kinds.items():
            if not conforms(getattr(self, name), kind):
                raise ValueError(f"no valid {name}")


class Watch:
    """What a loader leaves in a model while it runs dry. To be made before it does."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._told, self._held = model, facts.of_model(model), facts.held(model)
        self.digest = digest_of(self._told)

    def attributes(self, found: Survey) -> Attributes | None:
        """What it has set, if that can be set again; None where it did more."""
        targets = {constant.target for constant in found.constants}
        for layer, mine in found.fillers.items():
            targets |= {f"{layer}.{name}".lstrip(".") for names in mine.values() for name in names}
        told, held = facts.of_model(self._model), facts.held(self._model)
        changed = {key for key in told.keys() | self._told.keys() if told.get(key) != self._told.get(key)}
        for key in held.keys() | self._held.keys():
            now, before = held.get(key), self._held.get(key)
            # weights and constants are written, and counted as such where they were not
            written = ".".join(filter(None, key)) in targets and now and before and now[:-1] == before[:-1]
            if now != before and not written:
                changed.add(key)
        found_attributes = []
        for path, name in sorted(changed):
            values = vars(self._model.get_submodule(path))
            value = values.get(name, values)
            if type(value) not in _PLAIN and value not in ({}, []):
                return None
            found_attributes.append([path, name, value])
        return found_attributes


def digest_of(told: Mapping[tuple[str, str], str]) -> str:
    """A name for the facts of a model."""
    return facts.digest(*(word for (path, name), value in told.items() for word in (path, name, value)))


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

    def restore(self, entry: Entry, record: Record) -> Survey:
        """The survey.

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
        for path, name, value in entry.attributes:
            if type(value) not in _PLAIN and value not in ({}, []):
                raise ValueError("no plain attribute")
            vars(record.model.get_submodule(path))[name] = value
        return found

    def keep(self, entry: Entry) -> None:
        """Keep what a load has shown; what goes wrong is only told."""
        entry = dataclasses.replace(entry, imported=_listed(facts.states(facts.imported() - self._imported)))
        try:
            entries.keep(self._path, vars(entry))
        except (OSError, RuntimeError) as error:
            self._log.info("octavo: the plan can't be remembered: %s", error)


def _listed(files: facts.Files) -> dict[str, Any]:
    """As JSON has it."""
    return {file: state and list(state) for file, state in files.items()}
