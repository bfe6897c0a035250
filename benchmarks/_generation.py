"""The measured side of `generate_gpu.py` and `turns_gpu.py`: models, each loaded one way, answer prompts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache, StaticCache

import octavo

WARM_STEPS = 3
_REPEATS = 3
#: steps of a decode that are timed together, in turns
_STEPS = 8


class Model:
    """A causal language model on a device, bf16 or octavo's, and its random prompts."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        config = self.model.generation_config  # nothing but the length ends an answer
        config.eos_token_id, config.pad_token_id, config.do_sample = None, 0, False
        self.answers: dict[int, torch.Tensor] = {}  # batch -> the tokens that generate made

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def prompts(self, batch: int, length: int) -> torch.Tensor:
        """int64 [batch, length], the same in every process."""
        generator = torch.Generator().manual_seed(batch * 1_000_003 + length)
        return torch.randint(3, self.model.config.vocab_size, (batch, length), generator=generator).to(self.device)

    def seconds(self, work: Callable[[], Any]) -> float:
        self.synchronize()
        began = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began


# -- prefill ----------------------------------------------------------------------------------------------------------


def prefill(
    model: Model, shapes: list[tuple[int, int]], reference: Path | None = None, write: bool = False
) -> dict[str, Any]:
    """Tokens a second of one forward pass over prompts, their keys and values kept.

    The logits after the first shape's prompts are written, or compared with those that the reference wrote.
    """
    found: dict[str, Any] = {}
    for batch, length in shapes:
        ids = model.prompts(batch, length)

        def work(ids: torch.Tensor = ids) -> torch.Tensor:
            return model.model(ids, use_cache=True, logits_to_keep=1).logits

        logits = work()
        if (batch, length) == shapes[0]:
            found["logits"] = _compare(logits.float().cpu(), reference, write)
        del logits
        took_s = statistics.median(model.seconds(work) for _ in range(_REPEATS))
        found[f"{batch}x{length}"] = {"s": round(took_s, 5), "tokens_per_s": round(batch * length / took_s, 1)}
    return found


def _compare(logits: torch.Tensor, reference: Path | None, write: bool) -> dict[str, Any]:
    if not bool(torch.isfinite(logits).all()):
        raise ArithmeticError("the logits are not finite")
    if reference is not None and write:
        torch.save(logits, reference)
        return {}
    if reference is None or not reference.is_file():
        return {"cosine": None}
    theirs = torch.load(reference)
    return {"cosine": round(float(torch.nn.functional.cosine_similarity(logits, theirs, -1).mean()), 5)}


# -- decode -----------------------------------------------------------------------------------------------------------


def generate(model: Model, batches: list[int], prompt: int, new: int) -> dict[str, Any]:
    """`model.generate` as users call it, greedy: what ``new`` tokens take beyond the first one."""
    found = {}
    for batch in batches:
        ids = model.prompts(batch, prompt)

        def answer(tokens: int, ids: torch.Tensor = ids) -> torch.Tensor:
            made = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens)
            assert made.shape[1] == prompt + tokens, made.shape
            model.answers[ids.shape[0]] = made[:, prompt:]
            return made

        answer(4)
        first_s = model.seconds(lambda: answer(1))
        found[str(batch)] = _rate(batch, new - 1, model.seconds(lambda: answer(new)) - first_s)
    return found


def static(model: Model, batches: list[int], prompt: int, new: int, how: str) -> dict[str, Any]:
    """Greedy steps over a static cache, nothing between them.

    Args:
        how: ``step`` as it is; ``graph``, captured once as a CUDA graph and replayed; ``compile``, by torch.compile
            with its own CUDA graphs.

    ``same_tokens`` is the share of tokens that `generate` made, too: less than 1 where roundings decide.
    """
    with model.model._optimize_model_for_decode():  # as generate does: another way to run experts
        return {str(batch): _static(model, batch, prompt, new, how) for batch in batches}


def _static(model: Model, batch: int, prompt: int, new: int, how: str) -> dict[str, Any]:
    ids = model.prompts(batch, prompt)
    cache = StaticCache(config=model.model.config, max_cache_len=prompt + 2 * WARM_STEPS + new + 1)
    token = model.model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    answer = torch.full((batch, new), -1, device=model.device)
    forward = (
        torch.compile(model.model.forward, mode="reduce-overhead", dynamic=False)
        if how == "compile"
        else model.model.forward
    )

    def step() -> None:
        logits = forward(token, past_key_values=cache, logits_to_keep=1).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))

    began = time.perf_counter()
    if how == "graph":
        stream = torch.cuda.Stream(model.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_STEPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay
    else:
        for _ in range(WARM_STEPS):
            step()
    model.synchronize()
    ready_s = time.perf_counter() - began

    def all_steps() -> None:
        for at in range(new):
            step()
            answer[:, at].copy_(token[:, 0])

    took_s = model.seconds(all_steps)
    if int(answer.min()) < 0:
        raise ArithmeticError("a step wrote no token")
    found = {**_rate(batch, new, took_s), "ready_s": round(ready_s, 2)}
    if batch in model.answers:
        theirs = model.answers[batch][:, 1 + WARM_STEPS :]
        found["same_tokens"] = round(float((answer[:, : theirs.shape[1]] == theirs).float().mean()), 3)
    return found


def _rate(batch: int, tokens: int, took_s: float) -> dict[str, Any]:
    return {"ms_per_step": round(1000 * took_s / tokens, 3), "tokens_per_s": round(batch * tokens / took_s, 1)}


# -- all of it --------------------------------------------------------------------------------------------------------


def load(way: str, folder: Path, device: torch.device) -> Any:
    if way == "bf16":
        loader = transformers.AutoModelForCausalLM
        return loader.from_pretrained(folder, dtype=torch.bfloat16, device_map=str(device))
    return octavo.load(folder, way.removeprefix("octavo-"), device, progress=False)


def measure(way: str, folder: Path, device_name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Run the tasks that ``options`` asks for, in this order; one that fails does not end the others."""
    device = torch.device(device_name)
    began = time.perf_counter()
    model = Model(load(way, folder, device), device)
    model.synchronize()
    found: dict[str, Any] = {"load_s": round(time.perf_counter() - began, 3)}
    if device.type == "cuda":
        found["allocated_bytes"] = torch.cuda.memory_allocated(device)
    experts = getattr(model.model.config, "_experts_implementation", None)
    found["experts"] = experts if isinstance(experts, str | None) else str(experts)
    decode = (options["batches"], options["prompt"], options["new"])
    reference = Path(options["reference"])
    tasks: dict[str, Callable[[], dict[str, Any]]] = {
        "prefill": lambda: prefill(model, [tuple(s) for s in options["prefill"]], reference, way == "bf16"),
        "generate": lambda: generate(model, *decode),
        **{how: lambda how=how: static(model, *decode, how) for how in ("step", "compile", "graph")},
    }
    with torch.no_grad():
        for name, task in tasks.items():
            if name in options["tasks"]:
                try:
                    found[name] = task()
                except Exception as error:  # of whatever kind: told, and the other tasks go on
                    found[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
                    torch._dynamo.reset()
    if device.type == "cuda":
        found["allocated_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


# -- in turns ---------------------------------------------------------------------------------------------------------


def in_turns(folder: Path, device_name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Every task by all ways, a call of each after the other; times over those of the first way, which is bf16."""
    device = torch.device(device_name)
    models = {way: Model(load(way, folder, device), device) for way in options["ways"]}
    works = {f"prefill {b}x{n}": {way: _prompt(m, b, n) for way, m in models.items()} for b, n in options["prefill"]}
    for batch in options["batches"]:
        works[f"decode {batch}"] = {way: _steps(model, batch, options["prompt"]) for way, model in models.items()}
    with torch.no_grad():
        return {"tasks": {task: _turns(models, calls, options["turns"]) for task, calls in works.items()}}


def _prompt(model: Model, batch: int, length: int) -> Callable[[], Any]:
    ids = model.prompts(batch, length)
    return lambda: model.model(ids, use_cache=True, logits_to_keep=1)


def _steps(model: Model, batch: int, prompt: int) -> Callable[[], Any]:
    """Steps of a decode, of which the cache is cut to the prompt afterwards."""
    cache = DynamicCache(config=model.model.config)
    ids = model.prompts(batch, prompt)

    def steps() -> None:
        if not cache.get_seq_length():
            model.model(ids, past_key_values=cache, logits_to_keep=1)
        for _ in range(_STEPS):
            model.model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
        cache.crop(-_STEPS)

    return steps


def _turns(models: dict[str, Model], works: dict[str, Callable[[], Any]], turns: int) -> dict[str, Any]:
    took: dict[str, list[float]] = {way: [] for way in works}
    for turn in range(-2, turns):  # two that compile, and choose among kernels
        for way, work in works.items():
            seconds = models[way].seconds(work)
            if turn >= 0:
                took[way].append(seconds)
    base, *_ = took.values()
    found = {}
    for way, times in took.items():
        low, middle, high = statistics.quantiles([a / b for a, b in zip(base, times, strict=True)], n=4)
        quartiles = [round(low, 3), round(high, 3)]
        found[way] = {
            "ms": round(1000 * statistics.median(times), 3),
            "faster": round(middle, 3),
            "quartiles": quartiles,
        }
    return found
