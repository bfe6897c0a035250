"""Asking a loaded model something, and printing its answer as it comes."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch

from ...errors import CheckpointError, OctavoError, of_user, passes
from ...text import told


class Output(Protocol):
    """Where words go as they come: a file, or what looks like one."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


def answer(
    model: Any,
    prompt: str,
    *,
    max_new_tokens: int,
    raw: bool = False,
    out: Output | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
) -> str:
    """The model's greedy answer.

    Args:
        raw: continue the prompt as text, even where the tokenizer has a chat template.
        out: where the answer is written, word by word as it comes.
        tokenizer: by default, that of the folder which the model was loaded from.
        trust_remote_code: whether that folder may bring tokenizer code of its own, which is then run.

    Raises:
        CheckpointError: the model's folder has no tokenizer, or what it says of generating can't be done.
    """
    tokenizer = tokenizer or load_tokenizer(model.config.name_or_path, trust_remote_code)
    try:
        inputs = _inputs(tokenizer, prompt, raw)
    except Exception as error:  # a template of the checkpoint's may raise anything
        if passes(error):
            raise
        raise CheckpointError(f"{model.config.name_or_path}: its tokenizer can't take this: {told(error)}") from error
    inputs = inputs.to(model.device)
    streamer = _writer(tokenizer, out) if out else None
    try:
        with torch.inference_mode():
            tokens = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,  # a checkpoint may ask for millions
                return_dict_in_generate=False,
                streamer=streamer,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # the checkpoint may ask for a way to generate that is not there, or is others' code
        if isinstance(error, OctavoError) or passes(error) or _within_octavo(error):
            raise
        raise CheckpointError(
            f"{model.config.name_or_path}/generation_config.json: transformers can't generate by it: {told(error)}"
        ) from error
    except KeyboardInterrupt:
        if out:
            out.write("\n")  # whatever comes next has a line of its own
        raise
    text: str = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def _inputs(tokenizer: Any, prompt: str, raw: bool) -> Any:
    """The tokens of a prompt, as what a user says where the tokenizer has a template for that."""
    if raw or not tokenizer.chat_template:
        inputs, maker = tokenizer(prompt, return_tensors="pt"), "it"
    else:
        said = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        inputs, maker = tokenizer(text, return_tensors="pt", add_special_tokens=False), "its chat template"
    if not inputs["input_ids"].numel():
        raise ValueError(f"{maker} makes nothing of the prompt")
    return inputs


def _within_octavo(error: Exception) -> bool:
    """Return True if an error came by way of a module of octavo's, and may be its fault."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(frame.f_globals.get("__name__", "").startswith("octavo.running") for frame in frames)


def load_tokenizer(folder: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint's folder; without trust, of one that brings no code for it.

    Raises:
        CheckpointError: there is none, or it needs code that is not trusted.
    """
    from transformers import AutoTokenizer

    from .own_code import refusal

    def load() -> Any:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)

    try:
        return _unasked(load)
    except Exception as error:  # transformers raises many kinds; all mean the same here
        if passes(error):
            raise
        refused = None if trust_remote_code else refusal(error, folder, "tokenizer_config.json")
        raise refused or CheckpointError(f"{folder}: no usable tokenizer: {told(error)}") from error


def _unasked(load: Callable[[], Any]) -> Any:
    """What ``load`` returns, while nobody is asked on stdin whether to run code.

    Tokenizers that are made of others load these without passing on whether code is trusted. transformers then asks,
    but only in the main thread, since it limits the time of its question by a signal. In any other it refuses.
    """
    with ThreadPoolExecutor(1, "octavo-tokenizer") as thread:
        return thread.submit(load).result()


def _writer(tokenizer: Any, out: Output) -> Any:
    from transformers import TextStreamer

    write, flush = of_user(out.write), of_user(out.flush)

    class Writer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text + ("\n" if stream_end else ""))
            flush()

    return Writer(tokenizer, skip_prompt=True, skip_special_tokens=True)
