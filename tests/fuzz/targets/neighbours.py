"""Files of other tools beside a checkpoint: ``modules.json``, ``adapter_config.json``, ``hf_quant_config.json``."""

from __future__ import annotations

from pathlib import Path

from octavo.checkpoint.checkpoint import Checkpoint
from octavo.conversion.small_files import find_small_files
from octavo.errors import CheckpointError

from ..mutator import Words
from .base import Target, shard_bytes


class Neighbours(Target):
    """The same text as each of them."""

    name = "neighbours"
    share = 5
    words = Words(
        keys=("path", "idx", "base_model_name_or_path", "quantization", "quant_algo", "bits", "w_bit", "quant_method"),
        texts=("1_Pooling", "1_Pooling/..", "..", "/", "", ".", "~", "x" * 300, "\0", "model.safetensors", "FP8"),
    )

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        tensors = {"a.weight": ("U8", [2, 4], 8), "a.bias": ("F32", [2], 8)}
        self.model, self.adapter = folder / "model", folder / "adapter"
        for place in (self.model / "1_Pooling", self.adapter):
            place.mkdir(parents=True)
        (self.model / "model.safetensors").write_bytes(shard_bytes(tensors))
        (self.model / "1_Pooling" / "config.json").write_text("{}")
        (self.model / "config.json").write_text("{}")
        (self.adapter / "adapter_model.safetensors").write_bytes(shard_bytes(tensors))

    def run(self, data: bytes) -> None:
        (self.adapter / "adapter_config.json").write_bytes(data)
        said = ""
        try:
            Checkpoint.open(self.adapter)
        except CheckpointError as error:
            said = str(error)
        assert "adapter_config.json" in said, "an adapter was opened as a model"
        for name in ("modules.json", "hf_quant_config.json", "quantize_config.json"):
            (self.model / name).write_bytes(data)
        checkpoint = Checkpoint.open(self.model)
        files, _ = find_small_files(checkpoint)
        outside = [file.path for file in files if not file.path.resolve().is_relative_to(self.model.resolve())]
        assert not outside, f"these would be copied: {outside}"
        str(checkpoint.quantization)
