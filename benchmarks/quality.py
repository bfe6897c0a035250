"""How far from the original are a model's answers when its weights are quantized, by octavo and by its peers?

    python benchmarks/quality.py                            both models, minutes on a GPU and hours on two cores
    python benchmarks/quality.py --device cpu --tokens 4096 --models smollm2

A GPU computes the answers if there is one; peers' functions run where they can, most of them on the CPU.

SmolLM2-135M, as `octavo demo` prepares it, reads the reference of the Python language, which comes with Python, in
windows of 512 tokens; Whisper tiny.en hears two minutes of recorded speech in windows of ten seconds, and is made to
say what the original says. All is computed in float32, the original too, so that only the weights differ; where it
says "activations", the inputs of quantized layers are 8-bit as well.

    kl        KL(original || quantized) in nats a token
    kl_se     its standard error, taken over windows
    sqnr_db   weights: 10 log10(sum of squares / sum of squared errors), over all that are quantized

Which of many equally good grids weights are rounded to is chance, and moves the divergence by a twentieth. So some ways
are *redrawn*: each matrix is multiplied by a random number between 1 and 2 first, and divided by it after. That says
nothing of rules whose grids follow the factor, as those of float32 scales do.

    redrawn   the mean of the divergences, their standard deviation, and over how many draws
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
from _quality_ways import ACTIVATIONS, REDRAWN, WAYS, QuantizedInputs, Way, linear_layers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from octavo.demo.model import prepare
from octavo.numerics import schemes

WINDOW = 512
#: bytes of the original's answers that are kept while every way is tried
AT_ONCE_BYTES = {"cpu": 1 << 30, "cuda": 16 << 30}


#: windows of which some ways are redrawn
REDRAWN_WINDOWS = 32


class Case:
    """A model, its original weights, and windows of tokens.

    Args:
        windows: tokens to predict.
        logits: of the window of a number -> float32 [tokens, vocabulary].
    """

    def __init__(
        self,
        model: nn.Module,
        windows: list[Tensor],
        logits: Callable[[int], Tensor],
        keep: tuple[str, ...],
        device: torch.device,
    ) -> None:
        self.windows, self.logits, self.device = windows, logits, device
        self.layers = dict(linear_layers(model, keep))
        self.original = {name: layer.weight.data.clone() for name, layer in self.layers.items()}
        for name in self.layers:
            self.layers[name].weight.data = self.original[name].float()
        model.float().to(device)

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
            missing[name] = _failure(name, error)
    for name in ACTIVATIONS:
        if name in ways:
            ways[f"{name}, activations"] = (ways[name][0], schemes.get(name.split()[1]).dtype)
    kl: dict[str, list[Tensor]] = {name: [] for name in ways}
    sums: dict[str, tuple[float, float]] = {}
    case.set(None)
    step = max(1, AT_ONCE_BYTES[case.device.type] // case.logits(0).nbytes)
    for start in range(0, len(case.windows), step):
        numbers = range(start, min(start + step, len(case.windows)))
        case.set(None)
        reference = [torch.log_softmax(case.logits(number), -1) for number in numbers]
        for name, (way, dtype) in list(ways.items()):
            try:
                sums[name] = case.set(way)
            except Exception as error:
                missing[name] = _failure(name, error)
                del ways[name]
                continue
            with QuantizedInputs(list(case.layers.values()), dtype):
                for number, wanted in zip(numbers, reference, strict=True):
                    found = torch.log_softmax(case.logits(number), -1)
                    kl[name].append((wanted.exp() * (wanted - found)).sum(-1).double().sum().cpu())
        common.say(f"  {numbers.stop} of {len(case.windows)} windows")
    results: dict[str, dict[str, Any]] = {**missing}
    lengths = torch.tensor([len(window) for window in case.windows]).double()
    for name in ways:
        each, (signal, noise) = torch.stack(kl[name]), sums[name]
        mean = each.sum() / lengths.sum()
        results[name] = {
            "kl": mean.item(),
            "kl_se": ((each - mean * lengths).std() / lengths.mean() / math.sqrt(len(each))).item(),
            "sqnr_db": 10 * math.log10(signal / noise) if noise else None,
        }
        common.say(f"  {name}: {results[name]['kl']:.5f} ± {results[name]['kl_se']:.5f} nats")
    return results


def redraw(case: Case, names: Iterable[str], draws: int) -> dict[str, dict[str, float]]:
    """Divergences over some draws of some ways, in a part of the windows."""
    numbers = range(min(len(case.windows), REDRAWN_WINDOWS))
    tokens = sum(len(case.windows[number]) for number in numbers)
    case.set(None)
    reference = [torch.log_softmax(case.logits(number), -1) for number in numbers]
    found: dict[str, dict[str, float]] = {}
    for name in names:
        each = []
        for draw in range(draws):
            generator = torch.Generator().manual_seed(draw)
            way = WAYS[name]()

            def scaled(weight: Tensor, way: Way = way, generator: torch.Generator = generator) -> Tensor:
                factor = 1 + torch.rand((), generator=generator)
                return way(weight.float() * factor).float() / factor

            case.set(scaled)
            answers = (torch.log_softmax(case.logits(number), -1) for number in numbers)
            sums = [(w.exp() * (w - a)).sum().item() for w, a in zip(reference, answers, strict=True)]
            each.append(sum(sums) / tokens)
        kl = torch.tensor(each).double()
        found[name] = {"kl": kl.mean().item(), "kl_sd": kl.std().item(), "draws": draws, "tokens": tokens}
        common.say(f"  {name}, redrawn: {kl.mean():.5f} ± {kl.std():.5f}: {[round(one, 5) for one in each]}")
    return found


def _failure(name: str, error: Exception) -> dict[str, str]:
    found = f"{type(error).__name__}: {error}"[:300]
    common.say(f"  {name} did not run: {found}")
    return {"error": found}


def prose(least: int) -> str:
    """At least so many characters of the reference of Python, without its examples."""
    topics = pydoc_data.topics.topics
    paragraphs = [p for name in sorted(topics) for p in topics[name].split("\n\n") if len(p) > 200 and ">>>" not in p]
    text = "\n\n".join(dict.fromkeys(paragraphs))
    assert len(text) >= least, f"{len(text)} characters"
    return text


def smollm2(tokens: int, device: torch.device) -> Case:
    folder = prepare(progress=common.say)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    ids = AutoTokenizer.from_pretrained(folder)(prose(4 * tokens))["input_ids"]
    count = min(tokens, len(ids)) // WINDOW
    windows = list(torch.tensor(ids[: count * WINDOW], device=device).view(count, WINDOW))

    def logits(number: int) -> Tensor:
        found: Tensor = model(windows[number][None]).logits
        return found[0].float()

    return Case(model, windows, logits, ("lm_head",), device)


def whisper(_: int, device: torch.device) -> Case:
    model, windows, logits = _quality_whisper.prepare(device)
    return Case(model, windows, logits, ("proj_out",), device)


MODELS = {"smollm2": smollm2, "whisper": whisper}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--tokens", type=int, default=32_768, help="of SmolLM2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=list(AT_ONCE_BYTES))
    parser.add_argument("--draws", type=int, default=8, help="of the ways that are redrawn")
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # products are float32 by default, convolutions are not
    models: dict[str, Any] = {}
    for name in options.models:
        began = time.perf_counter()
        case = MODELS[name](options.tokens, torch.device(options.device))
        tokens = sum(map(len, case.windows))
        common.say(f"{name}: {tokens:,} tokens in {len(case.windows)} windows")
        ways = measure(case, options.ways)
        names = [way for way in REDRAWN if "kl" in ways.get(way, {})] if options.draws else []
        for way, values in redraw(case, names, options.draws).items():
            ways[way]["redrawn"] = values
        models[name] = {
            "tokens": tokens,
            "windows": len(case.windows),
            "ways": ways,
            "seconds": round(time.perf_counter() - began, 1),
        }
    versions = common.versions(("compressed-tensors", "torchao", "nvidia-modelopt", "transformers", "torch"))
    values = {"window": WINDOW, "device": options.device, "peers": versions, "models": models}
    common.save("quality", Path(__file__).parent, values, write=not options.no_save)


if __name__ == "__main__":
    main()
