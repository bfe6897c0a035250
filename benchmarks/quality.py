"""How far from the original are a model's answers when its weights are quantized, by octavo and by its peers?

    python benchmarks/quality.py                            both models, some 20 minutes on two cores
    python benchmarks/quality.py --tokens 4096 --models smollm2

SmolLM2-135M, as `octavo demo` prepares it, reads the reference of the Python language, which comes with Python, in
windows of 512 tokens; Whisper tiny.en is forced to text of it while it hears noise. All is computed in float32, the
original too, so that only the weights differ; where it says "activations", the inputs of quantized layers are 8-bit
as well.

    kl        KL(original || quantized) in nats a token
    kl_se     its standard error, taken over windows
    sqnr_db   weights: 10 log10(sum of squares / sum of squared errors), over all that are quantized
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import _quality_whisper
import common
import torch
from _quality_ways import ACTIVATIONS, WAYS, QuantizedInputs, Way, linear_layers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.demo.model import prepare
from octavo.numerics import schemes

WINDOW = 512
#: windows whose logits of the original are kept while every way is tried
AT_ONCE = 8


class Case:
    """A model, its original weights, and windows of tokens.

    Args:
        logits: of windows -> float32 [windows, tokens, vocabulary].
    """

    def __init__(self, model: nn.Module, windows: Tensor, logits: Callable[[Tensor], Tensor], keep: tuple[str, ...]):
        self.windows, self.logits = windows, logits
        self.layers = dict(linear_layers(model, keep))
        self.original = {name: layer.weight.data.clone() for name, layer in self.layers.items()}
        for name in self.layers:
            self.layers[name].weight.data = self.original[name].float()
        model.float()

    def set(self, way: Way | None) -> tuple[float, float]:
        """Give the layers their weights by a way (None: the originals); returns the sums of squares and of errors."""
        signal = noise = 0.0
        for name, weight in self.original.items():
            wide = weight.float()
            made = wide if way is None else way(weight)
            assert made.shape == wide.shape
            signal += wide.double().square().sum().item()
            noise += (made.double() - wide.double()).square().sum().item()
            self.layers[name].weight.data.copy_(made)
        return signal, noise


def measure(case: Case, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """KL and SQNR of each way."""
    ways: dict[str, tuple[Way, torch.dtype | None]] = {}
    missing = {}
    for name in names:
        try:
            ways[name] = (WAYS[name](), None)
        except Exception as error:  # of a peer that is not installed, or is another version
            missing[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
    for name in ACTIVATIONS:
        if name in ways:
            ways[f"{name}, activations"] = (ways[name][0], schemes.get(name.split()[1]).dtype)
    kl: dict[str, list[Tensor]] = {name: [] for name in ways}
    sums: dict[str, tuple[float, float]] = {}
    for start in range(0, len(case.windows), AT_ONCE):
        windows = case.windows[start : start + AT_ONCE]
        case.set(None)
        reference = [torch.log_softmax(case.logits(window[None]), -1) for window in windows]
        for name, (way, dtype) in list(ways.items()):
            try:
                sums[name] = case.set(way)
            except Exception as error:
                missing[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
                del ways[name]
                continue
            with QuantizedInputs(list(case.layers.values()), dtype):
                for window, wanted in zip(windows, reference, strict=True):
                    found = torch.log_softmax(case.logits(window[None]), -1)
                    kl[name].append((wanted.exp() * (wanted - found)).sum(-1).double().mean())
        common.say(f"  {start + len(windows)} of {len(case.windows)} windows")
    results: dict[str, dict[str, Any]] = {**missing}
    for name in ways:
        each, (signal, noise) = torch.stack(kl[name]), sums[name]
        results[name] = {
            "kl": each.mean().item(),
            "kl_se": (each.std() / math.sqrt(len(each))).item() if len(each) > 1 else None,
            "sqnr_db": 10 * math.log10(signal / noise) if noise else None,
        }
        common.say(f"  {name}: {results[name]['kl']:.5f} ± {results[name]['kl_se'] or 0:.5f} nats")
    return results


def prose(least: int) -> str:
    """At least so many characters of the reference of Python, without its examples."""
    topics = pydoc_data.topics.topics
    paragraphs = [p for name in sorted(topics) for p in topics[name].split("\n\n") if len(p) > 200 and ">>>" not in p]
    text = "\n\n".join(dict.fromkeys(paragraphs))
    assert len(text) >= least, f"{len(text)} characters"
    return text


def smollm2(tokens: int) -> Case:
    folder = prepare(progress=common.say)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prose(4 * tokens))["input_ids"]
    count = min(tokens, len(ids)) // WINDOW
    windows = torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
    return Case(model, windows, lambda window: model(window).logits[0].float(), ("lm_head",))


def whisper(tokens: int) -> Case:
    model, windows, logits = _quality_whisper.prepare(prose(4 * tokens), tokens)
    return Case(model, windows, logits, ("proj_out",))


MODELS = {"smollm2": smollm2, "whisper": whisper}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--tokens", type=int, default=32_768, help="of SmolLM2; Whisper is forced to an eighth of them")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    models: dict[str, Any] = {}
    for name in options.models:
        began = time.perf_counter()
        case = MODELS[name](options.tokens if name == "smollm2" else options.tokens // 8)
        common.say(f"{name}: {case.windows.numel():,} tokens")
        models[name] = {
            "tokens": case.windows.numel(),
            "ways": measure(case, options.ways),
            "seconds": round(time.perf_counter() - began, 1),
        }
    versions = common.versions(("compressed-tensors", "torchao", "transformers", "torch"))
    values = {"window": WINDOW, "peers": versions, "models": models}
    common.save("quality", Path(__file__).parent, values, write=not options.no_save)


if __name__ == "__main__":
    main()
