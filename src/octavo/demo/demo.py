"""The demonstration: a real model, loaded as FP8 while it streams, against its bf16 self."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TextIO

import torch

from .. import api
from ..adapters.transformers.chat import answer, load_tokenizer
from ..text import human_bytes
from .model import EVAL_TEXT, prepare

_GREEDY_TOKENS = 64


def run(scheme: str | None, prompt: str, *, plot: Path | None, out: TextIO | None) -> dict[str, Any]:
    """Prepare, load, report, answer, compare; returns the figures. Text goes to ``out`` as it comes."""

    def say(text: str = "") -> None:
        if out:
            out.write(text + "\n")
            out.flush()

    folder = prepare(progress=say)
    model = api.load(folder, scheme)
    report = model.load_report
    say(report.table())
    say(_curve(report))
    if plot is not None:
        report.plot(plot)
        say(f"memory curve: {plot}")
    say(f"\n> {prompt}")
    text = answer(model, prompt, max_new_tokens=96, out=out)
    say("\ncomparing with the same model in bf16 ...")
    comparison = compare(model, api.load(folder, None), load_tokenizer(str(folder)))
    say(
        f"{comparison['tokens']} tokens of prose: perplexity {comparison['perplexity_bf16']:.2f} in bf16, "
        f"{comparison['perplexity']:.2f} in FP8; KL divergence {comparison['kl']:.4f} nats a token; "
        f"the most likely next token is the same {comparison['greedy_agreement']:.1%} of the time"
    )
    return {"prompt": prompt, "text": text, "comparison": comparison, "load": report.to_dict()}


@torch.inference_mode()
def compare(model: Any, reference: Any, tokenizer: Any) -> dict[str, float]:
    """How close a model stays to a reference on a short English text.

    Perplexities, KL(reference || model) in nats a token, and how often both rank the same next token first.
    """
    ids = tokenizer(EVAL_TEXT, return_tensors="pt")["input_ids"].to(model.device)
    ours = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
    theirs = torch.log_softmax(reference(ids).logits[0, :-1].float(), -1)
    following = ids[0, 1:, None]
    return {
        "tokens": ids.shape[1],
        "perplexity": math.exp(-ours.gather(1, following).mean().item()),
        "perplexity_bf16": math.exp(-theirs.gather(1, following).mean().item()),
        "kl": torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean").item(),
        "greedy_agreement": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }


def _curve(report: Any, width: int = 60, height: int = 8) -> str:
    """The bytes in place over time, as text: it rises, and stays under the line of the unquantized model."""
    began = next((s.at_s for s in report.trace if s.placed_bytes), 0.0)
    samples = [s for s in report.trace if s.at_s >= began]
    if not samples:
        return ""
    span = max(samples[-1].at_s - began, 1e-9)
    columns = [0] * width
    for sample in samples:
        columns[min(width - 1, int((sample.at_s - began) / span * width))] = sample.placed_bytes
    for i in range(1, width):
        columns[i] = max(columns[i], columns[i - 1])
    lines = [f"{human_bytes(report.source_bytes):>12} {'-' * width} the model, unquantized"]
    for level in range(height, 0, -1):
        threshold = report.source_bytes * (level - 0.5) / height
        lines.append(" " * 13 + "".join("█" if value >= threshold else " " for value in columns))
    lines.append(f"{'0':>12} {'-' * width} {span:.2f} s")
    return "\n".join(line.rstrip() for line in lines)
