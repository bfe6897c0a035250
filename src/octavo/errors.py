"""Every error that a user can cause.

    OctavoError
    ├── CheckpointError      the source can't be read as a safetensors checkpoint
    │   └── SourceChangedError   it changed while it was being read, or since an interrupted run
    ├── RecipeError          an unknown scheme, an ambiguous or unmatched pattern, an option that can't be honoured
    ├── CoverageError        checkpoint and model don't fit: missing, unexpected, misshapen tensors
    ├── WeightError          a weight that can't be quantized (non-finite values)
    ├── LoaderError          a weight loader does what can't be followed box by box
    ├── UpdateError          an update in place failed midway; says which layers are new, which old
    ├── OutputError          the target exists, is not ours, or can't be written (disk full)
    ├── DeviceError          a device that isn't there, or too small a budget
    └── MissingExtraError    an optional package is not installed

Messages say what happened, where, and what to do. Whatever is found in one step is reported in one message: see
``raise_problems``.
"""

from __future__ import annotations

from collections.abc import Sequence


class OctavoError(Exception):
    """Base of every error that a user can cause."""


class CheckpointError(OctavoError):
    """The source can't be read as a safetensors checkpoint."""


class SourceChangedError(CheckpointError):
    """The source changed while it was being read, or since an interrupted run began."""


class RecipeError(OctavoError):
    """A recipe that is unknown, ambiguous, or can't be honoured on this checkpoint."""


class CoverageError(OctavoError):
    """The checkpoint's tensors and the model's parameters don't cover each other exactly."""


class WeightError(OctavoError):
    """A weight that can't be quantized."""


class LoaderError(OctavoError):
    """A weight loader does what can't be followed: reads before it writes, writes no boxes, writes after the end."""


class UpdateError(OctavoError):
    """An update in place failed midway. Running the whole update again heals.

    ``new`` layers hold the update's weights, ``old`` ones those of before, ``torn`` ones some of both.
    """

    def __init__(self, message: str, new: Sequence[str], old: Sequence[str], torn: Sequence[str]) -> None:
        super().__init__(message)
        self.new, self.old, self.torn = tuple(new), tuple(old), tuple(torn)


class OutputError(OctavoError):
    """The output can't be written."""


class DeviceError(OctavoError):
    """A device is absent, or a memory budget too small."""


class MissingExtraError(OctavoError):
    """An optional dependency is missing; the text holds the exact command that installs it."""

    def __init__(self, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs packages that are not installed: pip install 'octavo[{extra}]'")
        self.extra = extra


MAX_PROBLEMS_SHOWN = 50


def raise_problems(error: type[OctavoError], subject: object, problems: Sequence[str], advice: str = "") -> None:
    """Raise ``error`` with all ``problems`` in one message; do nothing when there are none."""
    if not problems:
        return
    shown = list(problems[:MAX_PROBLEMS_SHOWN])
    if len(problems) > len(shown):
        shown.append(f"... and {len(problems) - len(shown)} more")
    if len(shown) == 1:
        text = f"{subject}: {shown[0]}"
    else:
        text = f"{subject}: {len(problems)} problems\n" + "\n".join(f"  - {line}" for line in shown)
    raise error(f"{text}\n{advice}" if advice else text)
