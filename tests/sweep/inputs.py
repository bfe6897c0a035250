"""Small inputs for any model, guessed from its forward's signature and its config, until one is taken."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .tiny import parts

_TOKENS = 12


def inputs_for(model: Any) -> tuple[dict[str, Tensor] | None, str]:
    """Inputs that ``model`` takes, or None and what it said of the simplest."""
    said = ""
    for inputs in _guesses(model):
        try:
            outputs = run(model, inputs)
        except Exception as error:  # whatever it raises on what it was not made for
            said = said or f"{type(error).__name__}: {str(error)[:200]}"
            continue
        if outputs and all(bool(output.isfinite().all()) for output in outputs):
            return inputs, ""
        said = said or "its outputs are not finite"
    return None, said or "no parameter of its forward is known"


@torch.no_grad()
def run(model: Any, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The floating point tensors that a model answers with, in float32; caches are left out."""
    torch.manual_seed(0)
    return [tensor.float() for tensor in _tensors(model(**inputs)) if tensor.is_floating_point() and tensor.numel()]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from _tensors(value)


def _guesses(model: Any) -> Iterator[dict[str, Tensor]]:
    parameters = inspect.signature(model.forward).parameters
    needed = {
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        and parameter.kind is not inspect.Parameter.VAR_POSITIONAL
    }
    named = getattr(model, "main_input_name", "input_ids")
    main = {named} & parameters.keys() if isinstance(named, str) else parameters.keys() & set(named)
    decoder = {"decoder_input_ids"} & parameters.keys()
    text = {"input_ids", "bbox"} & parameters.keys()
    sees = {"pixel_values", "input_values", "input_features"} & parameters.keys()
    wanted = [needed | main, needed | main | decoder, needed | text | sees, needed | main | {"attention_mask"}, needed]
    choices = _values(model)
    seen = set()
    for names in wanted:
        known = sorted(names & choices.keys())
        if not known or tuple(known) in seen or not needed <= choices.keys():
            continue
        seen.add(tuple(known))
        for values in itertools.islice(itertools.product(*(choices[name] for name in known)), 24):
            yield dict(zip(known, values, strict=True))


def _values(model: Any) -> dict[str, list[Tensor]]:
    """Name of an input -> what it might have to be."""
    known = list(parts(model.config))
    dtype = model.dtype if model.dtype.is_floating_point and model.dtype.itemsize > 1 else torch.float32
    generator = torch.Generator().manual_seed(0)

    def find(*names: str, default: int) -> int:
        for name in names:
            for part in known:
                value = getattr(part, name, None)
                value = value[0] if isinstance(value, (list, tuple)) and value else value
                if type(value) is int:
                    return value
        return default

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    vocabulary = min([v for part in known if type(v := getattr(part, "vocab_size", None)) is int and v], default=64)
    ids = torch.randint(3, max(4, min(vocabulary - 40, 400)), (1, _TOKENS), generator=generator)
    books = find("num_codebooks", "num_quantizers", default=0)
    channels, side = find("num_channels", "in_channels", "in_chans", default=3), find("image_size", default=64)
    frames, bins = find("num_frames", "frames", default=4), find("num_mel_bins", "feature_size", "n_mels", default=80)
    long = find("max_length", "max_source_positions", default=64)
    images = [noise(1, channels, s, s) for s in dict.fromkeys((side, 224, 64, 384))]
    images += [noise(1, frames, channels, side, side), noise(1, 1, channels, side, side)]
    sounds = [noise(1, 4000), noise(1, 1, 4000), noise(1, long, bins), noise(1, 1, 1024, bins), noise(1, 16000)]
    features = [
        noise(1, *shape)
        for n in dict.fromkeys((64, 2 * long, 3000))
        for shape in ((bins, n), (n, bins), (1, bins, n), (1, n, bins))
    ]
    texts = [ids] + (
        [ids[:, None].expand(1, books, _TOKENS) % 64, ids[..., None].expand(1, _TOKENS, books)] * bool(books)
    )
    mask = torch.ones(1, _TOKENS, dtype=torch.long)
    past = find("context_length", default=32)
    return {
        "input_ids": texts,
        "decoder_input_ids": [ids, *texts[1:]],
        "attention_mask": [mask],
        "bbox": [torch.zeros(1, _TOKENS, 4, dtype=torch.long)],
        "pixel_values": images,
        "pixel_values_videos": [noise(1, frames, channels, side, side)],
        "input_values": sounds,
        "input_features": features,
        "past_values": [noise(1, past, find("num_input_channels", default=1)), noise(1, past)],
        "hidden_states": [noise(1, _TOKENS, find("hidden_size", "d_model", default=64))],
        "inputs_embeds": [noise(1, _TOKENS, find("hidden_size", "d_model", default=64))],
    }
