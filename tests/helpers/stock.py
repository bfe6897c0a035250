"""What stock readers make of a conversion: transformers and compressed-tensors as they are, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.numerics import schemes

from . import same_bytes
from .folders import tensors_of

SUFFIXES = {"compressed-tensors": "_scale", "compressed-tensors-w8a8": "_scale", "fp8": "_scale_inv"}


def unpacked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with weights as octavo has them in the place of packed ones."""
    made = dict(tensors)
    for name in [name for name in tensors if name.endswith("_packed")]:
        plain = name.removesuffix("_packed")
        if made[name].dtype == torch.uint8:
            made[plain] = torch.cat([made.pop(name), made[f"{plain}_scale"].view(torch.uint8)], -1)
            made[f"{plain}_scale"] = 1 / made.pop(f"{plain}_global_scale")
            continue
        q = (made.pop(name).view(torch.uint8).int() - 128).to(torch.int8)
        assert made.pop(f"{plain}_shape").tolist() == list(q.shape)
        made[plain] = q
    return made


def scales_of(tensors: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """Weight's name -> its scale."""
    suffix = SUFFIXES[format]
    return {name: tensors[name + suffix] for name in tensors if name + suffix in tensors}


def write_reference(source: Path, converted: Path, folder: Path, format: str, scheme: str) -> int:
    """An unquantized checkpoint of what the conversion stands for: `schemes.dequantize` to bf16; returns how many."""
    tensors, made = tensors_of(source), unpacked(tensors_of(converted))
    scales = scales_of(made, format)
    for name, stored in scales.items():
        scale = stored.view(schemes.E8M0) if scheme == "mxfp8" else stored
        tensors[name] = schemes.dequantize(made[name], scale, scheme, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text((source / "config.json").read_text())
    return len(scales)


def from_stock(
    folder: Path, *, dequantize: bool = False, model_class: Any = None, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """The model as transformers alone loads it; fails if a tensor of the checkpoint was not used or one was missing."""
    import transformers

    cls, options = model_class or transformers.AutoModelForCausalLM, dict[str, Any]()
    method = json.loads((folder / "config.json").read_text()).get("quantization_config", {}).get("quant_method")
    if dequantize and method == "fp8":
        options["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    elif dequantize and method:
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    model, info = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@torch.inference_mode()
def logits_of(model: Any) -> Tensor:
    return model(torch.arange(3, 19)[None]).logits


def different(model: Any, reference: Any, *, rounded: bool = False) -> list[str]:
    """Names of the reference's parameters and buffers that the model lacks, or holds other bits of.

    Args:
        rounded: compare in the reference's dtypes. What is dequantized, transformers 5.17 leaves in the dtype of its
            scale, float32, as numbers that were not rounded yet; later ones round them to the dtype of the model.
    """
    mine, wanted = model.state_dict(), reference.state_dict()
    if rounded:
        mine = {name: tensor.to(wanted[name].dtype) if name in wanted else tensor for name, tensor in mine.items()}
    return [name for name, tensor in wanted.items() if name not in mine or not same_bytes(mine[name], tensor)]
