"""``octavo plan``: what would be loaded or written, here or by an engine, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from .cli_options import accelerator, device_memory_bytes, parse_size
from .cli_output import say, say_json, say_lines
from .errors import RecipeError
from .text import human_bytes, shown

_BESIDE = "weights and staging; activations, caches on top"


def here(
    model: str, scheme: str | None, device: str, memory: Sequence[str] | None, as_json: bool, options: dict[str, Any]
) -> bool:
    """A load or a conversion; returns whether it fits."""
    from . import api

    sizes = [text.rpartition("=") for text in memory or ()]
    named = {name: parse_size(size) for name, equals, size in sizes if equals}
    if named:
        options |= _spread(named, options["staging_bytes"])
    elif memory == ["auto"] and device == "cpu":
        device = accelerator()
    room = device_memory_bytes(sizes[0][2], device) if sizes and not named else None
    # what is only planned need not be on a device that exists here
    made = api.plan(model, scheme, device, **options)
    # a conversion holds no model
    converts = options["model"] is False
    peaks = {d: made.peak_bytes(d) - (made.final_bytes(d) if converts else 0) for d in made.devices or ("cpu",)}
    rooms: Mapping[str, int] = {d: named.get(d, 0) for d in peaks} if named else dict.fromkeys(peaks, room or 0)
    fits = not memory or all(peaks[d] <= rooms[d] for d in peaks)
    if as_json:
        told = {"device_memory": named} if named else {"device_memory_bytes": room} if memory else {}
        say_json({**made.to_dict(), **told, **({"fits": fits} if memory else {})})
        return fits
    say_lines(made.table())
    what = "staging, as a conversion takes" if converts else _BESIDE
    worst = peaks if named else {"": max(peaks.values())}
    for name, peak in worst.items() if memory else ():
        _say_verdict(f"{name}: " if named else "", peak, rooms.get(name, room or 0), what)
    return fits


def _spread(named: Mapping[str, int], staging_bytes: int) -> dict[str, Any]:
    """What `octavo.plan` is to be told of devices and their memory. What does not fit there is left for the CPU."""
    room: dict[int | str, int] = {"cpu": 1 << 62}
    for name, nbytes in named.items():
        kind, _, number = name.partition(":")
        if kind == "cpu":
            room["cpu"] = nbytes
        elif kind in ("cuda", "xpu") and number.isdecimal():
            room[int(number)] = max(0, nbytes - staging_bytes)
        else:
            raise typer.BadParameter(f"{shown(name)}: write cuda:0=24GiB")
    return {"device_map": "auto", "max_memory": room}


def for_engine(
    engine: str,
    model: str,
    scheme: str,
    ranks: tuple[int, int, bool],
    memory: Sequence[str] | None,
    trust_remote_code: bool,
    as_json: bool,
    options: Mapping[str, Any],
) -> bool:
    """What an engine loads; returns whether it fits on each rank."""
    if engine != "vllm":
        raise RecipeError(f"unknown engine {shown(engine)}; known: vllm")
    if scheme == "none":
        raise RecipeError(f"--engine {engine} plans what becomes FP8 there: without a scheme, octavo has no part in it")
    if memory and (len(memory) > 1 or "=" in memory[0]):
        raise typer.BadParameter("--device-memory of an engine is one size, that of each rank")
    from .adapters.vllm.planning import plan_for_vllm

    tensor, pipeline, expert = ranks
    made = plan_for_vllm(
        model,
        scheme,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        expert_parallel=expert,
        trust_remote_code=trust_remote_code,
        **options,
    )
    room = None
    if memory:
        room = device_memory_bytes(memory[0], accelerator() if memory == ["auto"] else "cpu")
    fits = room is None or made.peak_bytes <= room
    if as_json:
        say_json({**made.to_dict(), **({} if room is None else {"device_memory_bytes": room, "fits": fits})})
        return fits
    say_lines(made.table())
    if room is not None:
        _say_verdict("", made.peak_bytes, room, _BESIDE)
    return fits


def _say_verdict(where: str, peak_bytes: int, room_bytes: int, what: str) -> None:
    verdict = "fits" if peak_bytes <= room_bytes else "does not fit"
    say(f"{where}{human_bytes(peak_bytes)} {verdict} into {human_bytes(room_bytes)} ({what})")
