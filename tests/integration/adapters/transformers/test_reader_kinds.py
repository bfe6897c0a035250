"""Models of kinds that transformers would misread in FP8: what it shares, keeps in float32, splits, can't map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from helpers.stock import from_stock, write_reference

pytest.importorskip("compressed_tensors")
transformers: Any = pytest.importorskip("transformers")

from sweep.cases import every_case  # noqa: E402
from sweep.tiny import candidates  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")


def converted(name: str, folder: Path) -> tuple[Any, list[str]]:
    """The class of a tiny model of this type, saved as source and converted as out, and what convert said."""
    case = next((case for case in every_case() if case.name == name), None)
    if case is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = next(model for model, _ in candidates(case.model_type, case.model_class) if model is not None)
    model.to(torch.bfloat16).save_pretrained(folder / "source")
    return type(model), octavo.convert(folder / "source", folder / "out", progress=False).notes


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        pytest.param("zamba/ZambaModel", "shares it, and has no scale of its own", id="layers that share matrices"),
        pytest.param("granite_speech5_ctc/GraniteSpeech5ForCTC", "shares it", id="a head that is an encoder's"),
        pytest.param("hy_v4/HYV4Model", "in float32, and takes the codes for weights", id="kept in float32"),
    ],
)
def test_what_would_be_misread_is_kept(name: str, kept: str, tmp_path: Path) -> None:
    cls, notes = converted(name, tmp_path)
    assert any(kept in note for note in notes), notes
    assert octavo.verify(tmp_path / "out", reader="transformers").ok
    assert write_reference(
        tmp_path / "source", tmp_path / "out", tmp_path / "plain", "compressed-tensors", "fp8_channel"
    )
    reference = from_stock(tmp_path / "plain", model_class=cls)
    dequantized = from_stock(tmp_path / "out", dequantize=True, model_class=cls).state_dict()
    for key, tensor in reference.state_dict().items():
        read = dequantized[key].to(tensor.dtype)  # from float32, not rounded yet, in transformers 5.17
        torch.testing.assert_close(read, tensor, rtol=0, atol=0, equal_nan=True)
    made = from_stock(tmp_path / "out", model_class=cls)
    bare = [
        path
        for path, module in made.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not hasattr(module, "weight_scale")
        and not torch.equal(module.weight, reference.get_submodule(path).weight)
    ]
    assert bare == []


def test_what_only_dequantizing_misreads_is_said(tmp_path: Path) -> None:
    cls, notes = converted("nomic_bert/NomicBertModel", tmp_path)
    said = any("read right only without dequantize=True" in note for note in notes)
    # transformers 5.17 makes the modules of FP8 first, and dequantizes them when all is loaded: it reads them right
    assert said != _dequantizes(cls, tmp_path), notes
    state = from_stock(tmp_path / "out", model_class=cls).state_dict()
    source = from_stock(tmp_path / "source", model_class=cls).state_dict()
    quantized = [name for name in source if f"{name}_scale" in state]
    assert any("q_proj" in name for name in quantized)
    for name in quantized:
        read = state[name].float() * state[f"{name}_scale"].float()
        torch.testing.assert_close(read, source[name].float(), rtol=0.07, atol=1e-3)


def _dequantizes(cls: Any, folder: Path) -> bool:
    """Whether stock transformers reads the conversion right if told to dequantize."""
    model, info = cls.from_pretrained(
        folder / "out",
        dtype=torch.bfloat16,
        output_loading_info=True,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )
    source = cls.from_pretrained(folder / "source", dtype=torch.bfloat16).state_dict()
    read = model.state_dict()
    return not any(info.values()) and all(
        torch.allclose(read[name].float(), tensor.float(), rtol=0.07, atol=1e-3) for name, tensor in source.items()
    )


def test_a_model_that_can_not_be_read_at_all_is_named(tmp_path: Path) -> None:
    _, notes = converted("dinov2/Dinov2Backbone", tmp_path)
    if any(note.startswith("proved") for note in notes):
        pytest.skip("this version of transformers reads it")
    assert any("can't load" in note and "ValueError" in note for note in notes), notes
    assert any(line.startswith("refused") for line in octavo.verify(tmp_path / "out", reader="transformers").lines())
