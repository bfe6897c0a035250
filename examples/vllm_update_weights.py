"""Give a running engine new weights, as a trainer does after each step: bf16 in, FP8 in place.

    python examples/vllm_update_weights.py MODEL CHECKPOINT_AFTER_TRAINING

MODEL and CHECKPOINT_AFTER_TRAINING are two bf16 checkpoints of one architecture. The second one is loaded twice: once
from its path, once from an iterator over tensors, which could as well come from a trainer in the same process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from vllm import LLM, SamplingParams

# the engine in this process, so that an iterator can be handed over as it is
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def tensors(folder: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, bf16 tensor), named as in the checkpoint; in order of the layers, so that few are held at a time."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                yield name, opened.get_tensor(name)


def main(model: str, trained: str) -> None:
    llm = LLM(model, load_format="octavo", enforce_eager=True, max_model_len=1024)

    def answer() -> str:
        outputs = llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        return outputs[0].outputs[0].text

    print("before:       ", answer())
    llm.collective_rpc("reload_weights", kwargs={"weights_path": trained})
    print("from a path:  ", answer())
    llm.collective_rpc("reload_weights", kwargs={"weights_path": model})
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors(trained)})
    print("from tensors: ", answer())


if __name__ == "__main__":
    main(*sys.argv[1:3])
