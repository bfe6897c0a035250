"""Which device each module of a transformers model goes to, as transformers' ``device_map`` says it.

A map that names modules is taken as it is. An automatic one is transformers' own to make, once modules have their FP8
form and before anything has memory: so it counts what will be there, scales included, and `Sizes` answers what it asks
beyond that. Hooks that bring inputs to where weights are come from accelerate, as in ``from_pretrained``.

Nothing of either is imported before it is needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ...errors import DeviceError
from ...machine import on_cpu, usable_device
from ...memory import available_bytes
from ...planning.plan import Plan
from ...planning.recipe import nearest
from ...running.modules import scale_name
from ...text import human_bytes, shown, told
from .options import ModelOptions

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")


def accelerators() -> list[str]:
    """The accelerators of this machine, in the order in which maps number them."""
    for kind in ("cuda", "xpu"):
        if count := getattr(torch, kind).device_count():
            return [f"{kind}:{number}" for number in range(count)]
    return []


def is_automatic(device_map: Any) -> bool:
    return isinstance(device_map, str) and device_map in AUTOMATIC


def name_of(device: Any) -> str:
    """A device as a map names it, a number being that of an accelerator."""
    if isinstance(device, int) and not isinstance(device, bool):
        found = accelerators()
        return found[device] if 0 <= device < len(found) else f"cuda:{device}"
    return f"{device}:0" if str(device) in ("cuda", "xpu") else str(device)


def candidates(device: str | torch.device, asked: ModelOptions) -> list[torch.device]:
    """The devices that a load may use, accelerators first.

    Raises:
        DeviceError: options contradict each other, or a device can't be used here.
    """
    device_map, max_memory = asked.device_map, asked.max_memory
    if max_memory is not None and not is_automatic(device_map):
        raise DeviceError(f"max_memory is for a device_map that decides by it ({', '.join(AUTOMATIC)})")
    if device_map is None:
        return [usable_device(device, begin=False)]
    if str(device) != "cpu":
        raise DeviceError(f"device={str(device)!r} and device_map both say where the model goes: leave one out")
    if is_automatic(device_map):
        if not isinstance(max_memory, Mapping | None):
            raise DeviceError(f"max_memory is {shown(max_memory)}, and not devices and how much of each")
        for number in (key for key in max_memory or () if isinstance(key, int)):
            usable_device(name_of(number), begin=False)
        names = [name for number, name in enumerate(accelerators()) if max_memory is None or number in max_memory]
    else:
        names = list(dict.fromkeys(placed(device_map).values()))
    found = [usable_device(name, begin=False) for name in names]
    return sorted(found, key=lambda each: each.type == "cpu") or [torch.device("cpu")]


def placed(device_map: Any) -> dict[str, str]:
    """A map that is not automatic, or has been made, as one from modules to devices: ``""`` is the whole model.

    Raises:
        DeviceError: it is no map, or has modules on disk.
    """
    if not isinstance(device_map, Mapping):
        if not isinstance(device_map, str | int | torch.device):
            raise DeviceError(f"device_map is {shown(device_map)}: neither a device nor modules and their devices")
        device_map = {"": device_map}
    places = {str(module): name_of(device) for module, device in device_map.items()}
    for module, device in places.items():
        if device != "disk" and not _is_device(device):
            what = f" for {module}" if module else ""
            raise DeviceError(f"device_map names {shown(device_map[module])}{what}: no device, as cpu, cuda:0 or 0 are")
    if on_disk := [module for module, device in places.items() if device == "disk"]:
        which = f"{shown(', '.join(on_disk))}" if on_disk != [""] else "the whole model"
        raise DeviceError(
            f"device_map has {which} on disk, and octavo holds weights in memory: give them another device, or more "
            "max_memory"
        )
    return places


def _is_device(name: str) -> bool:
    """Return True for names of devices that hold values, here or on another machine."""
    try:
        return torch.device(name).type != "meta"
    except RuntimeError:
        return False


def placer(places: Mapping[str, str], model: Any) -> Callable[[str], str]:
    """A function from the name of a parameter or buffer to its device.

    Buffers that no checkpoint holds may be left out of a map, as transformers has it.

    Raises:
        DeviceError: the map names what the model does not have; when it is called, for a parameter that it leaves out.
    """
    _check_names(places, model)
    loose = {name for name, _ in model.named_non_persistent_buffers()}
    spare = next((device for device in places.values() if not on_cpu(device)), "cpu")

    def place(name: str) -> str:
        path = name
        while path not in places and path:
            path = path.rpartition(".")[0]
        if path in places:
            return places[path]
        if name in loose:
            return spare
        raise DeviceError(f"device_map names no device for {name}")

    return place


def _check_names(places: Mapping[str, str], model: Any) -> None:
    """Raise for names in a map that are no modules of a model, and none of its tensors."""
    named = (model.named_modules(), model.named_parameters(remove_duplicate=False), model.named_buffers())
    known = {name for names in named for name, _ in names}
    if unknown := [module for module in places if module and module not in known]:
        near = nearest(unknown[0], known)
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        said = f"; the nearest is {shown(near)}" if near else ""
        raise DeviceError(f"device_map names {shown(unknown[0])}{more}, and the model has no such module{said}")


def spread(plan: Plan, model: Any, places: Mapping[str, str]) -> Plan:
    """The plan of a model, whose modules have their FP8 form, with each placement where the map says.

    Raises:
        DeviceError: the map leaves a parameter out, or puts weights that are tied on two devices.
    """
    from .model_plan import tied_names

    place, tied = placer(places, model), tied_names(model)
    for names in tied.values():
        devices = {name: place(name) for name in sorted(names)}
        if len(set(devices.values())) > 1:
            where = ", ".join(f"{name} on {device}" for name, device in devices.items())
            raise DeviceError(f"device_map has weights that are tied on several devices ({where}): give them one")
    placements = tuple(replace(placement, device=place(placement.name)) for placement in plan.placements)
    made = {name for p in plan.placements for name in (p.name, scale_name(p.name))}
    others: Counter[str] = Counter()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in made and not tied.get(name, set()) & made:
            others[place(name)] += tensor.nbytes
    found = replace(plan, placements=placements, other_bytes=dict(others))
    return replace(found, remarks=(*plan.remarks, *_lent(found)))


def _lent(plan: Plan) -> Iterable[str]:
    """What there is to say where accelerate lends weights of the CPU to an accelerator."""
    main = next((device for device in plan.devices if not on_cpu(device)), None)
    lent = sum(p.final_bytes for p in plan.placements if on_cpu(p.device))
    if main and lent:
        yield f"{human_bytes(lent)} are on the CPU, and copied to an accelerator each time they are used"


def free_bytes(device: int | str) -> int | None:
    """What a device that an automatic map may use has free; None where it is not here, or does not tell."""
    names = accelerators()
    if not isinstance(device, int):
        return available_bytes() or None if device == "cpu" else None
    if device >= len(names):
        return None
    found = torch.device(names[device])
    backend = getattr(torch, found.type)
    return int(backend.mem_get_info(found)[0] + backend.memory_reserved(found) - backend.memory_allocated(found))


#: more bytes than any model takes
_ANY = 1 << 60


class Sizes:
    """What transformers asks a quantizer while it makes a map."""

    def __init__(self, plan: Plan) -> None:
        self._sizes = {placement.name: placement.dtype.itemsize for placement in plan.placements}
        self._staging_bytes = plan.staging_bytes

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes that each element of a parameter will take."""
        return self._sizes.get(param_name, param.element_size())

    def adjust_max_memory(self, max_memory: dict[Any, Any]) -> dict[Any, Any]:
        """No more than what leaves room for staging in the memory that is free.

        Without an accelerator there is nothing to choose: unless somebody limits it, the model goes to the CPU.
        """
        rooms = {device: free_bytes(device) for device in max_memory}
        # of what is free, which differs from one moment to the next, transformers offers 90 %
        limited = any(nbytes < 0.8 * (rooms[device] or 0) for device, nbytes in max_memory.items())
        if not limited and not any(isinstance(device, int) for device in max_memory):
            return dict.fromkeys(max_memory, _ANY)
        return {
            device: nbytes if (free := rooms[device]) is None else min(nbytes, max(0, free - self._staging_bytes))
            for device, nbytes in max_memory.items()
        }

    def validate_environment(self, **_: Any) -> None:
        """Nothing is to be checked of a map."""


def decide(model: Any, plan: Plan, device_map: str, max_memory: Mapping[Any, Any] | None = None) -> dict[str, str]:
    """The automatic map of a model whose modules have their FP8 form.

    Raises:
        DeviceError: not all of it fits into memory, or transformers can't make sense of ``max_memory``.
    """
    from transformers.integrations.accelerate import _get_device_map

    if max_memory is None and not accelerators():
        return {"": "cpu"}
    try:
        room = None if max_memory is None else dict(max_memory)
        made = _get_device_map(model, device_map, room, Sizes(plan))  # type: ignore[arg-type]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise DeviceError(f"device_map={device_map!r}, max_memory={shown(max_memory)}: {told(error)}") from error
    return placed(made)


def dispatch(model: Any, places: Mapping[str, str]) -> None:
    """Let modules on several devices bring their inputs to where their weights are."""
    from transformers.integrations.accelerate import accelerate_dispatch

    if len(set(places.values())) > 1:
        accelerate_dispatch(model, None, dict(places), None, None, False)  # type: ignore[no-untyped-call]
