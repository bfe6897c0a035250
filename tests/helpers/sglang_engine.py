"""The whole engine of SGLang on a CPU, in a process of its own, with stand-ins for its kernels.

    python -m helpers.sglang_engine < job > answer

Layers in FP8 are computed as they are meant: dequantized, and multiplied. All else is SGLang's own, in its processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers import sglang_stand_ins
from helpers.sglang_loading import ENVIRONMENT, TESTS, Job

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [200, 100, 50, 25, 12, 6, 3]]
_OPTIONS = {
    "device": "cpu",
    "dtype": "bfloat16",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "skip_tokenizer_init": True,
    "disable_radix_cache": True,
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.2,
    "max_total_tokens": 512,
    "max_running_requests": 2,
    "context_length": 128,
    "skip_server_warmup": True,
    "log_level": "warning",
}
_LORA = {"enable_lora": True, "lora_backend": "torch_native", "max_loras_per_batch": 2}


@dataclass
class Answer:
    """What an engine said, or why it did not start."""

    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)  # of the prompt's tokens and of those made, for each prompt
    error: str = ""
    output: str = field(default="", repr=False)


def run(job: Job, timeout: float = 300, lora: Path | None = None) -> Answer:
    """Start an engine, ask it, and end it. A second one in the same process would wait for ever.

    Args:
        lora: an adapter for the first prompt.
    """
    options = {} if lora is None else {**_LORA, "lora_paths": [f"lora={lora}"]}
    finished = subprocess.run(
        [sys.executable, "-m", "helpers.sglang_engine"],
        input=json.dumps({**asdict(job), "model": str(job.model.absolute()), "options": {**options, **job.options}}),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **ENVIRONMENT},
        cwd=TESTS,
    )
    for line in finished.stdout.splitlines():
        if line.startswith('{"tokens"'):
            return Answer(**json.loads(line), output=finished.stderr)
    return Answer(error=f"the process ended with {finished.returncode}", output=finished.stderr)


# -- in the engine's processes ----------------------------------------------------------------------------------------


def scheduler(*arguments: Any, **options: Any) -> Any:
    """SGLang's process that loads and runs the model."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    _compute_plainly()
    return run_scheduler_process(*arguments, **options)


def _compute_plainly() -> None:
    from sglang.srt.layers.quantization.compressed_tensors import schemes

    from helpers.sglang_loading import as_on_hopper

    as_on_hopper()
    _pin_nothing()
    schemes.CompressedTensorsW8A8Fp8.apply_weights = _linear
    schemes.CompressedTensorsW8A8Fp8MoE.apply_weights = _experts


def _pin_nothing() -> None:
    """Memory is pinned for a device that is not here; SGLang's code for LoRA asks for it all the same."""
    import torch

    def unpinned(make: Any) -> Any:
        return lambda *arguments, pin_memory=False, **options: make(*arguments, **options)

    for name in ("tensor", "empty", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign,assignment]


def _linear(self: Any, layer: Any, x: Any, bias: Any = None) -> Any:
    import torch.nn.functional as F

    from octavo.numerics.schemes import dequantize

    block = self.weight_block_size is not None
    weight = layer.weight if block else layer.weight.t()  # turned for the kernel
    return F.linear(
        x, dequantize(weight, layer.weight_scale, "fp8_block" if block else "fp8_channel", dtype=x.dtype), bias
    )


def _experts(self: Any, layer: Any, dispatched: Any) -> Any:
    import torch
    from sglang.srt.layers.moe.fused_moe_native import moe_forward_native
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    from octavo.numerics.schemes import dequantize

    scheme = "fp8_block" if str(self.weight_quant.strategy).lower().endswith("block") else "fp8_channel"
    x = dispatched.hidden_states

    def wide(name: str) -> torch.Tensor:
        pairs = zip(getattr(layer, name), getattr(layer, f"{name}_scale"), strict=True)
        return torch.stack([dequantize(weight, scale, scheme, dtype=x.dtype) for weight, scale in pairs])

    plain = SimpleNamespace(num_experts=layer.num_experts, w13_weight=wide("w13_weight"), w2_weight=wide("w2_weight"))
    result = moe_forward_native(plain, x, dispatched.topk_output, self.moe_runner_config)
    return StandardCombineInput(hidden_states=result)


def _ask(job: dict[str, Any]) -> dict[str, Any]:
    from sglang.srt.entrypoints.engine import Engine

    class CpuEngine(Engine):  # type: ignore[misc]
        run_scheduler_process_func = staticmethod(scheduler)

    engine = CpuEngine(model_path=job["model"], **{**_OPTIONS, **job["options"]})
    try:
        sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
        lora = ["lora", None] if "lora_paths" in job["options"] else None
        said = engine.generate(
            input_ids=PROMPTS, sampling_params=sampling, return_logprob=True, logprob_start_len=0, lora_path=lora
        )
    finally:
        engine.shutdown()
    logprobs = [[one["meta_info"][f"{part}_token_logprobs"] for part in ("input", "output")] for one in said]
    return {"tokens": [one["output_ids"] for one in said], "logprobs": logprobs}


def _main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever logs to stdout does not mix with the answers
    try:
        answer = _ask(json.load(sys.stdin))
    except Exception as error:
        traceback.print_exc()
        answer = {"tokens": [], "error": f"{type(error).__name__}: {error}"}
    out.write(json.dumps(answer) + "\n")
    out.flush()


if __name__ in ("__main__", "__mp_main__"):  # and in the processes that SGLang starts, before anything else
    sglang_stand_ins.install()
if __name__ == "__main__":
    _main()
