"""What is asked of each tiny model, and how the answer is told.

load       `octavo.load` gives every parameter the bits that transformers and `schemes.quantize` give it
forward    it answers as the same model with dequantized weights
config     ``from_pretrained`` with an `octavo.OctavoConfig` gives the same model
convert    stock transformers reads `octavo.convert`'s result, dequantized and as it is, to the same parameters
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import octavo
from helpers import same_bytes
from helpers.models import differences, state_of
from helpers.stock import from_stock, write_reference
from octavo.errors import OctavoError
from octavo.numerics import schemes
from octavo.running.modules import quantized_weights, scale_name
from octavo.text import told

from .cases import Case
from .inputs import inputs_for, run
from .tiny import candidates

#: statuses, from the best to the worst; that of a case is its stages' worst
RIGHT, REFUSED, NOT_BUILT, WRONG = "right", "refused", "not built", "wrong"
#: of an output's norm, where both compute in float32
TOLERANCE = 1e-3
#: what a report says of transformers where it does not read a conversion
_DECLINED = re.compile(r"(not proved for )?transformers.*", re.IGNORECASE)
#: about so many, since tensors are not cut
_SHARDS = 3


class WrongError(Exception):
    """What octavo made is not what it should be."""


def check(case: Case, folder: Path) -> dict[str, Any]:
    """All that there is to say about a case, as JSON. ``folder`` is for its files."""
    began = time.monotonic()
    result: dict[str, Any] = {"case": case.name, "autos": case.autos, "status": NOT_BUILT, "stages": {}}
    try:
        model, inputs, why = _build(case, folder / "src")
        if model is None:
            return result | {"why": why}
        result |= {"parameters": sum(p.numel() for p in model.parameters()), "input": why or sorted(inputs or ())}
        del model
        _Checks(case, folder, inputs).all(result)
    except Exception as error:  # one of the sweep itself
        result |= {"status": WRONG, "why": f"{type(error).__name__}: {error}"}
    finally:
        result["seconds"] = round(time.monotonic() - began, 1)
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _build(case: Case, folder: Path) -> tuple[Any, dict[str, Tensor] | None, str]:
    """A tiny model, saved, and inputs that it takes; without inputs if no size of it takes any; or None and why."""
    first, said, reasons = None, "", []
    for model, why in candidates(case.model_type, case.model_class):
        if model is None:
            reasons.append(why)
            continue
        inputs, why = inputs_for(model)
        if inputs is None and first is not None:
            break  # a second size has told that it is not the size
        every_byte = sum(tensor.nbytes for tensor in model.state_dict().values())
        try:
            shutil.rmtree(folder, ignore_errors=True)
            model.save_pretrained(folder, max_shard_size=every_byte // _SHARDS + 1)
        except Exception as error:  # of renamings that don't fit so small a model
            reasons.append(f"it can't be saved: {type(error).__name__}: {error}")
            continue
        if inputs is not None:
            return model, inputs, ""
        first, said = model, why
    return first, None, f"no input: {said}" if first is not None else reasons[0]


class _Checks:
    """The stages of one case, in order; those after one that failed go on where they can."""

    def __init__(self, case: Case, folder: Path, inputs: dict[str, Tensor] | None) -> None:
        self.src, self.folder, self.inputs = folder / "src", folder, inputs
        self.cls = getattr(transformers, case.model_class)
        self.result: dict[str, Any] = {}

    def all(self, result: dict[str, Any]) -> None:
        self.result = result
        for stage in (self.load, self.forward, self.config, self.convert):
            result["stages"][stage.__name__] = found = self._judged(stage)
            if found["status"] == NOT_BUILT:
                break
        found = [stage["status"] for stage in result["stages"].values()]
        result["status"] = next(status for status in (NOT_BUILT, WRONG, REFUSED, RIGHT) if status in found)

    def _judged(self, stage: Callable[[], Any]) -> dict[str, Any]:
        try:
            return {"status": RIGHT, **(stage() or {})}
        except WrongError as error:
            return {"status": WRONG, "why": str(error)[:600]}
        except StockError as error:
            return {"status": NOT_BUILT, "why": str(error)[:600]}
        except OctavoError as error:
            return {"status": REFUSED, "why": str(error).replace(str(self.folder), "")[:600]}
        except Exception as error:  # raised by octavo or because of it
            return {"status": WRONG, "why": f"{type(error).__name__}: {error}"[:600]}

    # -- stages -------------------------------------------------------------------------------------------------------

    def load(self) -> dict[str, Any]:
        reference = self._stock(self.src)
        model = octavo.load(self.src, model_class=self.cls, dtype=torch.bfloat16, progress=False)
        state, plain = state_of(model), state_of(reference)
        fp8 = 0
        for name, scheme, parts in quantized_weights(model):
            weight, scale = state.pop(name), state.pop(scale_name(name))
            meant = schemes.dequantize(weight, scale, scheme, parts)
            q, s = schemes.quantize(_laid_out(plain.pop(name), meant), scheme, parts)
            if not same_bytes(weight, q) or not same_bytes(scale, s):
                raise WrongError(f"{name}: not what schemes.quantize makes of it")
            fp8 += weight.numel()
        if wrong := _unlike(state, plain):
            raise WrongError(f"{len(wrong)} kept tensors differ: {wrong[:4]}")
        every = sum(p.numel() for p in {id(p): p for p in reference.parameters() if p.ndim > 1}.values())
        return {"fp8": round(fp8 / max(1, every), 4)}

    def forward(self) -> dict[str, Any]:
        model = octavo.load(self.src, model_class=self.cls, dtype=torch.float32, progress=False)
        reference = self._stock(self.src, torch.float32)
        if self.inputs is None:
            return {"why": "no input"}
        reached = _count_calls(model)
        weights, state = dict(reference.named_parameters()), state_of(model)
        with torch.no_grad():
            for name, scheme, parts in quantized_weights(model):
                weight = schemes.dequantize(state[name], state[scale_name(name)], scheme, parts)
                weights[name].copy_(_laid_out(weight, weights[name]))
        inputs = {name: t.float() if t.is_floating_point() else t for name, t in self.inputs.items()}
        try:
            want = run(reference, inputs)
        except Exception as error:  # it took them in bf16
            return {"why": f"no input in float32: {type(error).__name__}: {error}"[:200]}
        got = run(model, inputs)
        if [t.shape for t in got] != [t.shape for t in want]:
            raise WrongError("outputs of other shapes")
        error = max((_distance(a, b) for a, b in zip(got, want, strict=True)), default=0.0)
        if not error <= TOLERANCE:
            raise WrongError(f"the outputs are {error:.2g} of their norm off")
        return {"error": float(f"{error:.1e}"), "ran": f"{len(reached)} of {len(list(quantized_weights(model)))}"}

    def config(self) -> None:
        direct = octavo.load(self.src, model_class=self.cls, dtype=torch.bfloat16, progress=False)
        model = self.cls.from_pretrained(self.src, dtype=torch.bfloat16, quantization_config=octavo.OctavoConfig())
        if found := differences(model, direct):
            raise WrongError(f"{len(found)} tensors differ from octavo.load's: {found[:4]}")

    def convert(self) -> dict[str, Any]:
        dst, plain = self.folder / "dst", self.folder / "plain"
        report = octavo.convert(self.src, dst, progress=False)
        result = {"notes": [note[:300] for note in report.notes]}
        if not octavo.verify(dst, against=self.src, progress=False).ok:
            raise WrongError("octavo.verify finds wrong bytes")
        scheme = "fp8_channel"
        if not write_reference(self.src, dst, plain, "compressed-tensors", scheme):
            return result | {"why": "nothing to quantize"}
        reference = self._stock(plain)
        declined = [note for note in report.notes if _DECLINED.match(note)]
        said = {how: self._read(dst, how == "dequantized", reference) for how in ("dequantized", "as it is")}
        if said["dequantized"] and not said["as it is"]:
            warned = next((note for note in report.notes if "without dequantize=True" in note), None)
            if warned or not _is_silent(said["dequantized"]):
                why = warned or f"transformers itself can't dequantize it: {told(said['dequantized'])[:250]}"
                return result | {"status": REFUSED, "why": why}
        if any(error and (_is_silent(error) or not declined) for error in said.values()):
            heard = {how: told(e)[:280] if e else RIGHT for how, e in said.items()}
            raise WrongError(f"read {'; '.join(': '.join(each) for each in heard.items())} {declined[:1] or ''}")
        return result | ({"status": REFUSED, "why": declined[0][:300]} if any(said.values()) else {})

    def _read(self, folder: Path, dequantize: bool, reference: Any) -> Exception | None:
        """What is wrong with the model that transformers alone makes of a conversion."""
        try:
            _compare_stock(from_stock(folder, dequantize=dequantize, model_class=self.cls), reference)
        except Exception as error:
            return error
        return None

    def _stock(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
        """The model as transformers alone loads it from unquantized weights."""
        try:
            return from_stock(folder, model_class=self.cls, dtype=dtype)
        except Exception as error:
            raise StockError(f"transformers can't read what it saved: {type(error).__name__}: {error}") from error


class StockError(Exception):
    """There is nothing to compare with."""


def _is_silent(error: Exception) -> bool:
    """Return True if what is wrong is ours to find: no error of transformers, which its users see."""
    return isinstance(error, (WrongError, AssertionError))


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A matrix or a stack as another one has it, which is about equal: [out, in] or [in, out], or one of all rows."""
    if tensor.ndim < like.ndim:
        tensor = tensor.view(like.shape[0], -1, tensor.shape[-1])
    same = [t for t in (tensor, tensor.transpose(-1, -2)) if t.shape == like.shape or t.ndim > like.ndim]
    return min((t.reshape(like.shape) for t in same), key=lambda t: _distance(t, like))


def _unlike(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    return [n for n in sorted(a.keys() | b.keys()) if n not in a or n not in b or not same_bytes(a[n], b[n])]


def _distance(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def _count_calls(model: Any) -> set[str]:
    """The quantized weights whose modules have run, once the model has."""
    reached: set[str] = set()
    for name, *_ in quantized_weights(model):
        module = model.get_submodule(name.rpartition(".")[0])
        module.register_forward_pre_hook(lambda *_, name=name: reached.add(name))
    return reached


def _compare_stock(model: Any, reference: Any) -> None:
    """Raise if a stock reader's parameters are not the reference's, dequantized where the reader keeps FP8."""
    mine = model.state_dict()
    wanted = reference.state_dict()
    for name in [name for name in mine if name.endswith("_scale") and name not in wanted]:
        scale, weight = mine.pop(name), name.removesuffix("_scale")
        if mine[weight].dtype == schemes.FP8:
            mine[weight] = (mine[weight].float() * scale.float()).to(torch.bfloat16)
    wrong = [name for name, tensor in wanted.items() if name not in mine or not _alike(mine[name], tensor)]
    if wrong:
        raise WrongError(f"{len(wrong)} of {len(wanted)} parameters differ: {wrong[:4]}")
    if raw := sorted(mine.keys() - wanted.keys()):
        raise WrongError(f"parameters that the model does not have: {raw[:4]}")


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float().nan_to_num(nan=1e30), b.float())
