"""The options and arguments that several commands share: what they take, how they explain and complete it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Optional

import typer

from .choices import AUTO, DEFAULT_SCHEME, FORMATS, SCHEMES
from .text import shown

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)


def parse_size(text: str) -> int:
    """'24GiB' -> 25769803776; KiB, MiB, GiB, TiB are powers of 1024, KB, MB, GB, TB (or K, M, G, T) of 1000."""
    found = _SIZE.match(text)
    if not found:
        raise typer.BadParameter(f"{shown(text)} is not a size; write 256MiB, 24GiB or 80GB")
    number, unit, binary = found.groups()
    size = float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " ")
    if size >= 2**63:
        raise typer.BadParameter(f"{shown(text)} is more than any machine has; write 256MiB, 24GiB or 80GB")
    return int(size)


def check_sizes(texts: list[str] | None) -> list[str] | None:
    """The same of sizes that may be those of devices: ``cuda:0=24GiB``."""
    for text in texts or ():
        check_size(text.rpartition("=")[2])
    if texts and len(texts) > 1 and not all("=" in text for text in texts):
        raise typer.BadParameter("of several sizes, each needs a device: cuda:0=24GiB")
    return texts


def check_size(text: str | None) -> str | None:
    """Refuse what is no size, before a command imports anything; ``auto`` is for the command to understand."""
    if text not in (None, "auto"):
        parse_size(text)
    return text


def accelerator() -> str:
    """The kind of device that ``--device-memory auto`` asks where none is named."""
    import torch

    for kind in ("cuda", "xpu"):
        if getattr(torch, kind).is_available():
            return kind
    raise typer.BadParameter("auto needs a GPU here; write a size such as 24GiB")


def device_memory_bytes(text: str, device: str) -> int:
    """A size, or for ``auto`` what the device has free."""
    if text != "auto":
        return parse_size(text)
    import torch

    from .machine import usable_device

    found = usable_device(device)
    free, _ = getattr(torch, found.type).mem_get_info(found)
    return int(free)


def _check_scheme(text: str) -> str:
    if text not in (*SCHEMES, AUTO, "none"):
        raise typer.BadParameter(f"{shown(text)}; known: {', '.join(SCHEMES)}, {AUTO}, none")
    return text


def _complete_scheme(incomplete: str) -> list[tuple[str, str]]:
    known = {name: terms.summary for name, terms in SCHEMES.items()} | {
        AUTO: f"{DEFAULT_SCHEME}, and of what is quantized already the scheme that keeps it",
        "none": "all weights stay as they are, or become bf16 if they are quantized already",
    }
    return [(name, summary) for name, summary in known.items() if name.startswith(incomplete)]


def _complete_format(incomplete: str) -> list[tuple[str, str]]:
    return [(name, terms.summary) for name, terms in FORMATS.items() if name.startswith(incomplete)]


def _listed(rows: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({row.summary})" for name, row in rows.items())


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a .safetensors file, or a hub id.", show_default=False),
]
Scheme = Annotated[
    str,
    typer.Option(
        *("--scheme", "-s"),
        metavar="SCHEME",
        help=f"What shares a scale: {_listed(SCHEMES)}; auto ({DEFAULT_SCHEME}, or what the source has); or none.",
        callback=_check_scheme,
        autocompletion=_complete_scheme,
    ),
]
Ignore = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads it at run time on Python 3.10)
    typer.Option(
        *("--ignore", "-i"),
        metavar="PATTERN",
        help="Leave these as they are: a name, a glob, or re:regex. Repeatable.",
    ),
]
Format = Annotated[
    str,
    typer.Option(
        *("--format", "-f"),
        metavar="FORMAT",
        help=f"Of a conversion: {_listed(FORMATS)}.",
        autocompletion=_complete_format,
    ),
]
FormatOrTold = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        *("--format", "-f"),
        metavar="FORMAT",
        help=f"Of a conversion, or of what an engine takes a checkpoint for: {_listed(FORMATS)}.",
        autocompletion=_complete_format,
    ),
]
Staging = Annotated[
    str,
    typer.Option(
        "--staging", metavar="SIZE", help="Memory beyond the result, at most: 64MiB, 1GB.", callback=check_size
    ),
]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--threads", metavar="NUMBER", help="Threads that read; by default one a core, at most 16."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings: read it before.")
]
DeviceMemory = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--device-memory",
        metavar="SIZE",
        help="Does it fit? 24GiB, 80GB, or auto to ask the device. Repeatable as cuda:0=24GiB: is it spread over them?",
        callback=check_sizes,
    ),
]
Engine = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--engine", metavar="NAME", help="Plan what vllm would load with octavo, on each of its ranks."),
]
TensorParallel = Annotated[
    int, typer.Option("--tensor-parallel-size", "-tp", min=1, metavar="NUMBER", help="Of an engine: as its own option.")
]
PipelineParallel = Annotated[
    int, typer.Option("--pipeline-parallel-size", "-pp", min=1, metavar="NUMBER", help="The same.")
]
ExpertParallel = Annotated[bool, typer.Option("--enable-expert-parallel", help="The same.")]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...")]
Prompt = Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT", help="What to answer.")]
Verify = Annotated[bool, typer.Option("--verify", help="Compare what is read with the digests that came with it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
