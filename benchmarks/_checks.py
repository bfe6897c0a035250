"""Is what a loader left behind the checkpoint's? That is read independently, and some of its tensors are compared."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

PROBES = 12
FP8_ERROR = 0.06  # relative; the rounding to e4m3 alone makes 0.026
_CHECK_ELEMENTS = 1 << 26


class WrongError(AssertionError):
    """A loader's result is not the checkpoint's content."""


# -- the checkpoint, read independently -------------------------------------------------------------------------------


class Probes:
    """Some tensors of the checkpoint, spread over it, that a loader's result is compared with."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.safetensors"))
        self.tensors: dict[str, tuple[Path, tuple[int, ...]]] = {}
        self.data_bytes = 0
        for path in self.files:
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            for name, entry in header.items():
                if name != "__metadata__":
                    self.tensors[name] = (path, tuple(entry["shape"]))
                    self.data_bytes += entry["data_offsets"][1] - entry["data_offsets"][0]
        matrices = [name for name, (_, shape) in self.tensors.items() if len(shape) > 1]
        spread = {matrices[at * (len(matrices) - 1) // (PROBES - 1)] for at in range(PROBES)}
        largest = max(matrices, key=lambda name: torch.Size(self.tensors[name][1]).numel())
        self.names = sorted(spread | {largest})
        self._seen: dict[str, tuple[torch.device, torch.Tensor]] = {}
        self._seen_bytes = 0

    def source(self, name: str, index: int | None = None) -> torch.Tensor:
        """The tensor as safetensors reads it on the CPU; ``index`` takes one member of a stack."""
        with safetensors.safe_open(self.tensors[name][0], framework="pt") as file:
            part = file.get_slice(name)
            return part[:] if index is None else part[index : index + 1][0]

    def see(self, name: str, tensor: torch.Tensor) -> None:
        """Called with every tensor that a loader hands out, before it is dropped: keeps a few elements of some."""
        self._seen_bytes += tensor.nbytes
        if name in self.names:  # waits, so that a tensor lent from a buffer is not overwritten meanwhile
            self._seen[name] = tensor.device, _some(tensor).to("cpu", copy=True)

    def check_seen(self, device: torch.device) -> dict[str, Any]:
        """Every byte was handed out, and what was kept is the checkpoint's."""
        if self._seen_bytes != self.data_bytes:
            raise WrongError(f"{self._seen_bytes:,} bytes were handed out, the checkpoint has {self.data_bytes:,}")
        for name in self.names:
            if name not in self._seen:
                raise WrongError(f"{name} was not handed out")
            where, found = self._seen[name]
            if where.type != device.type:
                raise WrongError(f"{name} is on {where}")
            if not torch.equal(found, _some(self.source(name))):
                raise WrongError(f"{name} differs from the checkpoint")
        return {"compared": len(self.names)}


def _some(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    return flat[:: max(1, flat.numel() // 4096)]


# -- is a model the checkpoint's? -------------------------------------------------------------------------------------


def check_model(model: Any, probes: Probes, device: torch.device) -> dict[str, Any]:
    """Weights are, where probed, those of the checkpoint (in FP8: up to its rounding); all are finite and in place."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    stored = _octavo_storage(model)
    compared, errors = 0, []
    for name in probes.names:
        found = _find(state, stored, name, probes.tensors[name][1])
        if found is None:
            continue
        value, index = found
        source = probes.source(name, index).to(value.device)
        if value.dtype == source.dtype:
            if not torch.equal(value, source):
                raise WrongError(f"{name} differs from the checkpoint")
        else:
            error = float((value - source.float()).norm() / source.float().norm())
            if not error < FP8_ERROR:
                raise WrongError(f"{name} is off by {error:.3f} of its norm")
            errors.append(error)
        compared += 1
    if compared < len(probes.names) / 2:
        raise WrongError(f"of {probes.names}, only {compared} could be found in the model")
    for name, tensor in state.items():
        if tensor.device.type != device.type:
            raise WrongError(f"{name} is on {tensor.device}")
        if not _finite(tensor.detach()):
            raise WrongError(f"{name} is not finite")
    fp8 = sum(tensor.numel() for tensor in state.values() if tensor.dtype == torch.float8_e4m3fn)
    largest = max(errors, default=0.0)
    return {"compared": compared, "compared_in_fp8": len(errors), "largest_error": largest, "fp8_elements": fp8}


def _finite(tensor: torch.Tensor) -> bool:
    for part in tensor.reshape(-1).split(_CHECK_ELEMENTS):
        if part.dtype == torch.float8_e4m3fn:  # all ones but the sign: not a number
            if bool(((part.view(torch.uint8) & 0x7F) == 0x7F).any()):
                return False
        elif part.dtype == torch.float8_e8m0fnu:
            if bool((part.view(torch.uint8) == 0xFF).any()):
                return False
        elif part.is_floating_point() and not bool(torch.isfinite(part).all()):
            return False
    return True


@dataclass(frozen=True)
class _Stored:
    """How octavo stores a quantized weight."""

    scheme: str
    parts: tuple[int, ...]
    transposed: bool  # [out, in], though the checkpoint has [in, out]


def _octavo_storage(model: Any) -> dict[str, _Stored]:
    from octavo.running.modules import quantized_weights

    return {
        name: _Stored(
            scheme, parts, bool(getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False))
        )
        for name, scheme, parts in quantized_weights(model)
    }


def _find(
    state: dict[str, torch.Tensor], stored: dict[str, _Stored], name: str, shape: tuple[int, ...]
) -> tuple[torch.Tensor, int | None] | None:
    """The values that a model holds for a checkpoint tensor, and which member of it they are if it is a stack (the
    last); None where this does not know to look."""
    expert = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
    half, index, member = slice(None), None, None
    if expert and name not in state:
        path, number, kind = expert.groups()
        index = int(number)
        name = f"{path}.down_proj" if kind == "down" else f"{path}.gate_up_proj"
        half = {"gate": slice(shape[0]), "up": slice(shape[0], None), "down": half}[kind]
    elif len(shape) == 3:
        index = member = shape[0] - 1
        name = name.replace("input_linear.weight", "experts.gate_up_proj")
        name = name.replace("output_linear.weight", "experts.down_proj")
    if name not in state:
        return None
    value = _values(state, stored, name, index)[half]
    return (value, member) if value.shape == shape[-2:] else None


def _values(state: dict[str, torch.Tensor], stored: dict[str, _Stored], name: str, index: int | None) -> torch.Tensor:
    weight = state[name].detach()
    weight = weight if index is None else weight[index]
    if weight.dtype != torch.float8_e4m3fn:
        return weight
    scale = state[f"{name}_scale" if name in stored else f"{name}_scale_inv"].detach()
    scale = scale if index is None else scale[index]
    if name in stored:
        from octavo.numerics import schemes

        value = schemes.dequantize(weight, scale, stored[name].scheme, stored[name].parts)
        return value.T if stored[name].transposed else value
    rows, cols = weight.shape
    return weight.float() * scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
