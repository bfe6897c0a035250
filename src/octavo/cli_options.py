"""The options and arguments that several commands share: what they take and how they explain it."""

from __future__ import annotations

import re
from typing import Annotated, Optional

import typer

from .choices import FORMATS, SCHEMES

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)


def parse_size(text: str) -> int:
    """'24GiB' -> 25769803776; KiB, MiB, GiB, TiB are powers of 1024, KB, MB, GB, TB (or K, M, G, T) of 1000."""
    found = _SIZE.match(text)
    if not found:
        raise typer.BadParameter(f"{text!r} is not a size; write 256MiB, 24GiB or 80GB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def _check_scheme(text: str) -> str:
    if text not in (*SCHEMES, "none"):
        raise typer.BadParameter(f"{text!r}; known: {', '.join(SCHEMES)}, none")
    return text


Model = Annotated[str, typer.Argument(help="A folder, a .safetensors file, or a hub id.", show_default=False)]
Scheme = Annotated[str, typer.Option("--scheme", "-s", help=f"{', '.join(SCHEMES)}, or none.", callback=_check_scheme)]
Ignore = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads it at run time on Python 3.10)
    typer.Option("--ignore", "-i", help="Leave these as they are: a name, a glob, or re:regex. Repeatable."),
]
Format = Annotated[str, typer.Option("--format", "-f", help=f"Of a conversion: {' or '.join(FORMATS)}.")]
Staging = Annotated[str, typer.Option("--staging", help="Memory beyond the result, at most.")]
Threads = Annotated[Optional[int], typer.Option("--threads", help="Reader threads; default: one a core.")]  # noqa: UP045
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
