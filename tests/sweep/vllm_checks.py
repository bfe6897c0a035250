"""What is asked of each tiny model in vLLM, and how the answer is told.

stock      stock vLLM loads the unquantized checkpoint (otherwise there is nothing to compare with)

and then, for each scheme:

online     stock vLLM loads it with its own online quantization to FP8 (which is not judged)
load       with ``--load-format octavo`` it holds the same weights, quantized
convert    stock vLLM loads `octavo.convert`'s result, and holds the same weights, quantized
equal      the two hold the same bits, wherever both hold FP8 or both do not

Parameters are compared as loaders leave them, before vLLM lays them out for its kernels.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import base_loader, get_model

from helpers import same_bytes
from octavo.adapters.transformers.reader import TransformersReader
from octavo.adapters.vllm import asking, versions
from octavo.adapters.vllm.reader import lay_out
from octavo.conversion.convert import convert_checkpoint
from octavo.conversion.proof import Judgement
from octavo.errors import OctavoError
from octavo.numerics.schemes import FP8
from octavo.planning.recipe import Recipe

from .cases import Case
from .published import add_fields, respell
from .tiny import candidates

RIGHT, REFUSED, NOT_BUILT, WRONG = "right", "refused", "not built", "wrong"
#: what is converted is not for this vLLM, which was said
DECLINED = "declined"
#: scheme -> the name of vLLM's own
_ONLINE = {"fp8_channel": "fp8_per_channel", "fp8_block": "fp8_per_block"}
_SHARDS = 3
_BLOCK = 128
#: sizes of a model that vLLM is shown, until it takes one
_SIZES = 2
#: of a parameter's norm: what e4m3 takes away is a fortieth
_TOLERANCE = 0.05
State = Mapping[str, Tensor]


class WrongError(Exception):
    """What octavo made is not what it should be."""


def check(case: Case, folder: Path, schemes: Sequence[str]) -> dict[str, Any]:
    """All that there is to say about a case, as JSON. ``folder`` is for its files."""
    began = time.monotonic()
    result: dict[str, Any] = {"case": case.name, "status": NOT_BUILT, "schemes": {}}
    try:
        with _one_rank(folder):
            reference, served = _built(case, folder / "src", result)
            for scheme in schemes if reference is not None else ():
                result["schemes"][scheme] = _check(scheme, folder, reference, served)
        found = {each["status"] for each in result["schemes"].values()}
        result["status"] = next((status for status in (WRONG, REFUSED, RIGHT) if status in found), NOT_BUILT)
    except Exception as error:  # one of the sweep itself
        result |= {"status": WRONG, "why": _text(error)}
    finally:
        result["seconds"] = round(time.monotonic() - began, 1)
        shutil.rmtree(folder, ignore_errors=True)
    return result


def _check(scheme: str, folder: Path, reference: State, served: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to say about a scheme."""
    src, dst = folder / "src", folder / scheme
    stages: dict[str, Any] = {}
    states: dict[str, State] = {}
    vllm = _ForkedVllm()

    def online() -> dict[str, Any]:
        try:
            _load(src, quantization=_ONLINE[scheme], **served)
        except Exception as error:
            return {"loads": False, "why": _text(error)}
        return {"loads": True}

    def load() -> dict[str, Any]:
        options = {"load_format": "octavo", "model_loader_extra_config": {"scheme": scheme, "remember": False}}
        states["load"] = _load(src, **options, **served)
        return {"fp8": _compare(states["load"], reference)}

    def convert() -> dict[str, Any]:
        readers = (TransformersReader(), vllm)
        options = (1 << 28, 1, "cpu", None, False, False, False)
        with set_current_vllm_config(VllmConfig()):  # without which no model can be made that uses vLLM's activations
            recipe = Recipe.coerce(scheme, ())
            report = convert_checkpoint(src, dst, recipe, "compressed-tensors", *options, lambda: readers)
        found: dict[str, Any] = {"notes": [note[:300] for note in report.notes]}
        declined = [note for note in report.notes if "vLLM" in note and ("can't load" in note or "not proved" in note)]
        try:
            states["convert"] = _load(dst, **served)
        except Exception as error:
            status = DECLINED if declined else WRONG
            return {**found, "status": status, "why": f"stock vLLM does not start: {_text(error)} {declined[:1]}"}
        written = {name: tensor for name, tensor in reference.items() if name not in vllm.missing}
        states["convert"] = {n: t for n, t in states["convert"].items() if n not in vllm.missing}
        return {**found, "fp8": _compare(states["convert"], written)}

    def equal() -> dict[str, Any]:
        mine, stock = states["load"], states["convert"]
        mine = {name: tensor for name, tensor in mine.items() if name not in vllm.missing}
        alike = [name for name in mine.keys() & stock.keys() if mine[name].dtype == stock[name].dtype]
        if wrong := sorted(n for n in alike if not same_bytes(mine[n], stock[n])):
            raise WrongError(f"{len(wrong)} of {len(alike)} parameters differ: {wrong[:4]}")
        return {"equal": len(alike), "otherwise": len(mine.keys() | stock.keys()) - len(alike)}

    for stage in (online, load, convert, equal):
        if stage is not equal or len(states) == 2:
            stages[stage.__name__] = _judged(stage, folder)
    found = [stage["status"] for stage in stages.values()]
    return {"status": next(status for status in (WRONG, REFUSED, RIGHT) if status in found), "stages": stages}


def _judged(stage: Callable[[], Any], folder: Path) -> dict[str, Any]:
    try:
        return {"status": RIGHT, **stage()}
    except WrongError as error:
        return {"status": WRONG, "why": str(error)[:600]}
    except OctavoError as error:
        return {"status": REFUSED, "why": str(error).replace(str(folder), "")[:600]}
    except Exception as error:  # raised by octavo or because of it
        return {"status": WRONG, "why": _text(error)}


def _built(case: Case, src: Path, result: dict[str, Any]) -> tuple[State | None, dict[str, Any]]:
    """What stock vLLM makes of a tiny model that transformers has saved, and the options that it takes for that."""
    reasons: list[str] = []
    tried = 0
    for model, why in candidates(case.model_type, case.model_class):
        if model is None:
            reasons.append(why)
            continue
        tried += 1
        try:
            shutil.rmtree(src, ignore_errors=True)
            every_byte = sum(tensor.nbytes for tensor in model.state_dict().values())
            model.save_pretrained(src, max_shard_size=every_byte // _SHARDS + 1)
            result["parameters"] = sum(p.numel() for p in model.parameters())
            del model
            add_fields(src)
        except Exception as error:
            reasons.append(f"it can't be saved: {_text(error)}")
            continue
        for _ in itertools.chain(("as saved",), respell(src)):
            for options in ({}, {"runner": "pooling"}):
                try:
                    return _load(src, **options), options
                except Exception as error:
                    reasons.append(f"stock vLLM: {_text(error)}".replace(str(src), "MODEL"))
        if tried == _SIZES:
            break
    result["why"] = next((why for why in reasons if why.startswith("stock")), reasons[0] if reasons else "no size")
    return None, {}


# -- vLLM -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _one_rank(folder: Path) -> Iterator[None]:
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        initialize_model_parallel(1, 1)
    base_loader.process_weights_after_loading = lambda *_: None
    if not torch.accelerator.is_available():
        torch.accelerator.empty_cache = lambda: None  # as vLLM's worker does on a CPU
    yield


def _load(folder: Path, **options: Any) -> State:
    """The parameters of vLLM's model of a folder."""
    arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "bfloat16", **options}
    config = EngineArgs(model=str(folder), **arguments).create_engine_config()
    with set_current_vllm_config(config):
        model = get_model(vllm_config=config)
    exempt = versions.exempt(model)
    return {name: tensor.detach() for name, tensor in model.named_parameters() if name not in exempt}


class _ForkedVllm:
    """`octavo.adapters.vllm.reader.VllmReader`, but in a fork of this process, which has imported vLLM already."""

    missing: tuple[str, ...] = ()  # what the last checkpoint does not fill, which is whatever was in memory

    def judge(self, checkpoint: Any, tensors: Any, scales: Any, config: Any) -> Judgement:
        with tempfile.TemporaryDirectory() as folder:
            lay_out(Path(folder), checkpoint, tensors, scales, config)
            answer = in_fork(lambda: asking.judge(Path(folder)), 200)
        if answer is None:
            return Judgement(asking.NAME, unproved="its process ended")
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in answer.items()}
        judgement = Judgement(asking.NAME, **fields)
        self.missing = judgement.missing
        return judgement


def in_fork(act: Callable[[], dict[str, Any]], limit_s: float) -> dict[str, Any] | None:
    """What a function returns in a child of this process; None if that ends, or takes longer."""
    import select
    import signal

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        with contextlib.suppress(BaseException), os.fdopen(write, "w") as pipe:
            json.dump(act(), pipe)
        os._exit(0)
    os.close(write)
    until, data = time.monotonic() + limit_s, b""
    with os.fdopen(read, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0, until - time.monotonic()))[0]:
            some = pipe.read(1 << 16)
            if not some:
                break
            data += some
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        found: dict[str, Any] = json.loads(data)
    except ValueError:
        return None
    return found


# -- comparing --------------------------------------------------------------------------------------------------------


def _compare(state: State, reference: State) -> float:
    """Raise if parameters stand for other weights than the reference's; returns the share of FP8 in matrices."""
    meant = dict(state)
    fp8 = 0
    for name, weight in state.items():
        if weight.dtype == FP8:
            scale = meant.pop(f"{name}_scale")
            meant[name] = _unpacked(weight, scale)
            fp8 += weight.numel()
    if odd := sorted(meant.keys() ^ reference.keys()):
        raise WrongError(f"{len(odd)} parameters are only in one of both: {odd[:4]}")
    wrong = []
    for name, tensor in reference.items():
        same = same_bytes(meant[name], tensor) if state[name].dtype == tensor.dtype else _near(meant[name], tensor)
        if not same:
            wrong.append(name)
    if wrong:
        raise WrongError(f"{len(wrong)} of {len(reference)} parameters are not what they stand for: {wrong[:4]}")
    return round(fp8 / max(1, sum(t.numel() for t in reference.values() if t.ndim > 1)), 4)


def _unpacked(weight: Tensor, scale: Tensor) -> Tensor:
    """Of scales for rows, or for blocks."""
    if scale.ndim == weight.ndim:
        for axis in (-2, -1):
            if 1 < scale.shape[axis] < weight.shape[axis] or (axis == -2 and scale.shape[axis] == 1):
                scale = scale.repeat_interleave(_BLOCK, axis).narrow(axis, 0, weight.shape[axis])
    return weight.float() * scale.reshape(*scale.shape, *[1] * (weight.ndim - scale.ndim))


def _near(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return bool((a.float() - b.float()).norm() <= _TOLERANCE * b.float().norm())


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:400]
