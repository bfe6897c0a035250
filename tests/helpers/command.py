"""What a run of the command line left: exit code, stdout and stderr, and what scripts rely on of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


def only_json(ended: Ended) -> Any:
    """What stdout holds: one JSON value and nothing else; and stderr holds nothing."""
    assert ended.err == ""
    assert ended.out.endswith("\n")
    return json.loads(ended.out, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def refused(ended: Ended, *parts: str) -> None:
    """Wrong usage or a user's error: exit code 2, a message on stderr that holds ``parts``, nothing else."""
    assert ended.code == 2
    assert ended.out == ""
    assert "Traceback" not in ended.err
    # click wraps lines within boxes
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", ended.err).split())
    for part in parts:
        assert part in text, ended.err
