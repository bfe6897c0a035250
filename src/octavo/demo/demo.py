"""The demonstration: a real model, loaded as FP8 while it streams, beside its bf16 self.

Once loaded, both models compute in float32. So all that differs between them are the weights; and the answers are the
same on every CPU, where sums in bf16 depend on the instructions that it has.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

import torch
from torch import nn

from .. import api
from ..adapters.transformers.chat import answer, load_tokenizer
from ..running.modules import QuantizedLinear
from ..text import human_bytes
from .model import EVAL_TEXT, prepare
from .screen import Screen

# Questions whose answers hold in every scheme and on every CPU: at each token the best logit leads the second by far
# more than quantizing, or another order of sums, moves them. A test measures that.
QUESTION = "What is the capital city of Japan?"
NEXT_QUESTION = "What is the plural of mouse?"

_MAX_NEW_TOKENS = 64
_COMPARED_TOKENS = 64


def run(
    scheme: str | None, question: str = QUESTION, *, plot: Path | None = None, out: TextIO | None = None
) -> dict[str, Any]:
    """Prepare, load, ask and compare, telling ``out`` as it goes; return the figures.

    Raises:
        OctavoError: see `prepare` and `octavo.load`.
    """
    began = monotonic()
    screen = Screen(out)
    try:
        screen.say("octavo demo: a real language model becomes FP8 while its file is being read")
        screen.heading("The model: SmolLM2-135M-Instruct in bf16")
        folder = prepare(progress=lambda line: screen.say(f"  {line}"))
        screen.say(f"  {folder}")
        screen.heading(f"Loading it, scheme {scheme or 'none'} (importing transformers' code comes first)")
        model = api.load(folder, scheme)
        report = model.load_report
        _show_load(screen, report, plot)
        reference = api.load(folder, None, dtype=torch.float32, progress=False)  # exactly the bf16 weights
        with _one_thread():
            compute_in_float32(model)
            tokenizer = load_tokenizer(str(folder))
            answers = _ask(screen, {"bf16": reference, scheme or "none": model}, question, tokenizer)
            comparison = compare(model, reference, tokenizer)
        _show_comparison(screen, comparison)
        _show_end(screen, folder, monotonic() - began)
    finally:
        screen.end_line()  # after Ctrl-C, too
    return {"question": question, "answers": answers, "comparison": comparison, "load": report.to_dict()}


def compute_in_float32(model: nn.Module) -> None:
    """Widen in place, exactly, whatever is not FP8; the products of FP8 weights then come in float32, too."""
    for module in model.modules():
        if not isinstance(module, QuantizedLinear):
            module._apply(lambda t: t.float() if t.is_floating_point() else t, recurse=False)  # type: ignore[no-untyped-call]


@torch.inference_mode()
def compare(model: Any, reference: Any, tokenizer: Any) -> dict[str, float]:
    """How close a model stays to a reference on a short English text.

    KL(reference || model) in nats a token, and how often both rank the same next token first.
    """
    ids = tokenizer(EVAL_TEXT, return_tensors="pt")["input_ids"][:, :_COMPARED_TOKENS].to(model.device)
    ours = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
    theirs = torch.log_softmax(reference(ids).logits[0, :-1].float(), -1)
    return {
        "tokens": ids.shape[1],
        "kl": torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean").item(),
        "greedy_agreement": (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    }


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: layers as small as these are done before others have woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# -- the steps --------------------------------------------------------------------------------------------------------


def _show_load(screen: Screen, report: Any, plot: Path | None) -> None:
    screen.say(screen.curve(report.trace, report.source_bytes, report.final_bytes))
    source, final = human_bytes(report.source_bytes), human_bytes(report.final_bytes)
    converted = sum(count for count, _ in report.quantized.values())
    kept = ", ".join(f"{count} {reason}{'s' * (count != 1)}" for reason, (count, _) in report.kept.items())
    screen.say(f"  read       {source}, once, at {report.read_gb_per_s:.2f} GB/s")
    screen.say(f"  in memory  {final} ({report.final_bytes / report.source_bytes:.0%}); while loading, at most")
    screen.say(f"             {human_bytes(report.staging_bytes)} beside it: there is no bf16 copy of the model")
    screen.say(f"  in FP8     {converted} weights; as they were: {kept}")
    if plot is not None:
        report.plot(plot)
        screen.say(f"  drawn      {plot}")


def _ask(screen: Screen, models: dict[str, Any], question: str, tokenizer: Any) -> dict[str, str]:
    """The answer of each model, under its label."""
    screen.heading("Asking it, as it was and as it is now")
    screen.begin("  > ")
    screen.write(question)
    width = max(map(len, models))
    answers = {}
    for label, model in models.items():
        screen.begin(f"  {label:<{width}}  ")
        answers[label] = answer(model, question, max_new_tokens=_MAX_NEW_TOKENS, out=screen, tokenizer=tokenizer)
    return answers


def _show_comparison(screen: Screen, found: dict[str, float]) -> None:
    screen.heading(f"Comparing both on {found['tokens']} tokens of prose")
    screen.say(f"  KL divergence           {found['kl']:.4f} nats a token")
    screen.say(f"  most likely next token  the same {found['greedy_agreement']:.1%} of the time")


def _show_end(screen: Screen, folder: Path, took_s: float) -> None:
    path = shlex.quote(str(folder))
    screen.heading(f"Done in {took_s:.1f} s. Only the model is kept, for the next time. What to try next:")
    screen.say(f"  octavo plan {path}")
    screen.say(f"  octavo convert {path} smollm2-fp8")
    screen.say(f"  octavo generate {path} \\\n      --prompt {shlex.quote(NEXT_QUESTION)}")
    screen.say("and with a model of your own, a folder or a hub id, in place of that path.")
    screen.say(f"To remove the model: rm -r {path}")
