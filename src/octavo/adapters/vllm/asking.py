"""The process in which vLLM is asked (see `reader`): names of folders come in, judgements go out, a line each.

vLLM's own code makes its config of config.json, builds the model on meta, and runs ``load_weights`` dry
(`octavo.adapters.engine.judging`); where that asks a tensor for its values, once more on the CPU. What the model has no
use for is shown to the draft model that vLLM would make of the same checkpoint.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.speculative import SpeculativeConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from ...checkpoint.header import TensorInfo
from ...errors import OctavoError
from ...streaming.meter import collection_paused
from ..engine.judging import Case, Verdict
from ..engine.survey import error_text
from . import versions
from .watching import Watch, watch

NAME = f"vLLM {vllm.__version__}"
#: of a checkpoint whose model has to be built in memory
_MOST_BYTES = 8 << 30


def main() -> None:
    """Answer until nobody asks any more."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is said does not mix with the answers
    with tempfile.TemporaryDirectory(prefix="octavo-vllm-") as scratch:
        with set_current_vllm_config(VllmConfig()):
            init_distributed_environment(1, 0, f"file://{scratch}/rendezvous", 0, "gloo")
            initialize_model_parallel(1, 1)
        failed = versions.inspect_in_this_process()
        for line in sys.stdin:
            failed.clear()
            with collection_paused():
                answer = judge(Path(line.rstrip("\n")))
            if failed and answer.get("unproved"):  # vLLM says no more than that there was an error
                answer["unproved"] = f"it can't import its model: {error_text(failed[0])}"
            out.write(json.dumps({"reader": NAME, **answer}) + "\n")
            out.flush()


def judge(folder: Path) -> dict[str, Any]:
    """The fields of an `octavo.conversion.proof.Judgement` but for the reader's name."""
    case = json.loads((folder / "case.json").read_text())
    tensors = {name: TensorInfo(name, dtype, tuple(shape), 0, 0, size) for name, dtype, shape, size in case["tensors"]}
    served = folder / "model"
    asked = _Asked(served, tensors, case["scales"])
    try:
        return asked.answer()
    except OctavoError as error:
        return {"unproved": str(error)}
    except Exception as error:
        why = error_text(error)
    try:
        asked.try_plain()
    except Exception as error:
        return {"unproved": f"it does not start, with or without FP8: {error_text(error)}"}
    return {"refused": dict.fromkeys(case["scales"], f"it does not start: {why}")}


@dataclass(frozen=True)
class _Asked:
    """A checkpoint that vLLM is asked about."""

    served: Path
    tensors: Mapping[str, TensorInfo]
    scales: Mapping[str, str]

    def answer(self) -> dict[str, Any]:
        config = self._config()
        found = self._look(config, config.model_config)
        if found.verdict.refusal and (pooling := self._pooling()):  # of a model without a head, which does not generate
            config, found = pooling
        if found.verdict.refusal:
            return {"unproved": found.verdict.refusal, "unexpected": list(found.verdict.homeless)}
        looks, unread, unproved = [found], set(found.verdict.unread), ""
        if unread and self._has_draft(config):
            try:
                draft = self._config(speculative_config={"method": "mtp", "num_speculative_tokens": 1})
                looks.append(self._look(draft, draft.speculative_config.draft_model_config))
            except Exception as error:
                unproved = f"its draft model can't be asked about {min(unread)}: {error_text(error)}"
            unread = unread.intersection(*(look.verdict.unread for look in looks))
        if found.verdict.empty:  # what the loader did not recognise may have been meant for there
            why = f"it passes over it, and leaves {found.verdict.empty[0]} empty"
            found.verdict.misread.update(dict.fromkeys(unread, why))
        if self.scales and unread.issuperset(self.scales):
            kind = type(found.model).__name__
            what = f"its {kind} has no place for {min(self.scales)}, nor for any other quantized tensor"
            return {"unproved": what}
        judgement = self._judgement(looks)
        return {**judgement, "unproved": unproved} if unproved else judgement

    def try_plain(self) -> None:
        """Start without quantization; what that raises is no matter of FP8."""
        path = self.served / "config.json"
        plain = json.loads(path.read_text())
        plain.pop("quantization_config", None)
        path.write_text(json.dumps(plain))
        config = self._config()
        _build(config, config.model_config, "meta")

    def _config(self, **options: Any) -> VllmConfig:
        """vLLM's own, for ``vllm serve`` without options."""
        arguments = EngineArgs(model=str(self.served), skip_tokenizer_init=True, enforce_eager=True, **options)
        return arguments.create_engine_config()

    def _pooling(self) -> tuple[VllmConfig, _Look] | None:
        """The same as a model that embeds, if it can be served as one."""
        try:
            config = self._config(runner="pooling")
            return config, self._look(config, config.model_config)
        except Exception:
            return None

    def _has_draft(self, config: VllmConfig) -> bool:
        """Return True if vLLM makes another model, that drafts, of a checkpoint of this kind."""
        hf_config = copy.deepcopy(config.model_config.hf_config)
        before = list(hf_config.architectures)
        try:
            return bool(SpeculativeConfig.hf_config_override(hf_config).architectures != before)
        except Exception:  # of a config that lacks what a draft model needs
            return False

    # -- one model ----------------------------------------------------------------------------------------------------

    def _look(self, config: VllmConfig, model_config: Any) -> _Look:
        forget = versions.remember_layers(config)
        try:
            return self._look_on("meta", config, model_config)
        except Exception as error:
            # what a tensor without data raises when it is asked for them
            if "meta" not in str(error).lower():
                raise
            if sum(tensor.nbytes for tensor in self.tensors.values()) > _MOST_BYTES:
                raise OctavoError(f"it would have to be built in memory: {error_text(error)}") from error
        forget()
        return self._look_on("cpu", config, model_config)

    def _look_on(self, device: str, config: VllmConfig, model_config: Any) -> _Look:
        watched = watch(config.quant_config) if config.quant_config is not None else Watch()
        model = _build(config, model_config, device)
        plain, unbuilt = watched.refusals(model)
        failed: list[Exception] = []

        def load(weights: Iterator[tuple[str, Tensor]]) -> None:
            try:
                model.load_weights(weights)  # type: ignore[operator]
            except Exception as error:
                failed.append(error)
                raise

        verdict = Case(model, load, self.tensors, self.scales, plain, unbuilt, versions.exempt(model)).judge()
        for error in failed if device == "meta" else ():
            if "meta" in str(error).lower():
                raise error
        return _Look(model, verdict, watched)

    # -- words --------------------------------------------------------------------------------------------------------

    def _judgement(self, looks: Sequence[_Look]) -> dict[str, Any]:
        misread: dict[str, str] = {}
        refused: dict[str, str] = {}
        waiting: set[str] = set()
        ignored = self._ignored()
        for look in looks:
            misread.update(look.verdict.misread)
            refused.update(look.verdict.refused)
            for path, why in look.verdict.waiting.items():
                names = look.watched.names.get(look.model.get_submodule(path), [path])
                patterns = [f"re:{re.escape(name)}$" for name in names]
                if ignored.issuperset(patterns):
                    return {"unproved": f"it makes {names[0]} FP8, which config.json says it is not ({why})"}
                waiting.update(patterns if ignored.issuperset(names) else names)
        return {
            "misread": misread,
            "refused": refused,
            "waiting": sorted(waiting),
            "missing": list(looks[0].verdict.missing),
        }

    def _ignored(self) -> set[str]:
        config = json.loads((self.served / "config.json").read_text())
        quantization = config.get("quantization_config") or {}
        keys = ("ignore", "modules_to_not_convert", "ignored_layers")
        return {name for key in keys for name in quantization.get(key) or ()}


@dataclass(frozen=True)
class _Look:
    """What was seen of one model."""

    model: nn.Module
    verdict: Verdict
    watched: Watch


def _build(config: VllmConfig, model_config: Any, device: str) -> nn.Module:
    with set_default_torch_dtype(model_config.dtype), torch.device(device):
        model: nn.Module = initialize_model(config, model_config=model_config)
    return model
