"""What models compute beside their weights: tables whose dtype or device they take from their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from _models import Checkpoints
from torch import nn

import octavo
from helpers.models import differences
from octavo.running.modules import quantized_weights, scale_name


def kept(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that a model has but what is FP8."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, *_ in quantized_weights(model):
        del tensors[name], tensors[scale_name(name)]
    return tensors


def test_tables_that_ask_layers_for_their_dtype_are_those_of_from_pretrained(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2]}
    model = transformers.Swinv2Model(transformers.Swinv2Config(window_size=4, **sizes)).bfloat16()
    model.save_pretrained(tmp_path / "plain")
    expected = dict(transformers.Swinv2Model.from_pretrained(tmp_path / "plain", dtype="auto").named_buffers())
    options: dict[str, Any] = {"dtype": "auto", "quantization_config": octavo.OctavoConfig()}
    loaded = octavo.load(tmp_path / "plain", model_class=transformers.Swinv2Model)
    loaded.save_pretrained(tmp_path / "saved")
    models = [
        loaded,
        transformers.Swinv2Model.from_pretrained(tmp_path / "plain", **options),
        transformers.Swinv2Model.from_pretrained(tmp_path / "saved", dtype="auto"),
    ]
    for model in models:
        tables = dict(model.named_buffers())
        assert tables.keys() == expected.keys()
        assert all(torch.equal(tables[name], expected[name]) for name in tables)
        assert any(name.endswith("relative_coords_table") for name in tables)
        assert list(quantized_weights(model))


class Placed(nn.Linear):
    """A layer with a table, which is made where its weight is, as timm does."""

    def place(self) -> None:
        self.table = nn.Buffer(torch.arange(4.0, device=self.weight.device), persistent=False)


class PlacedModel(transformers.LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = Placed(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.place()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Placed):
            module.place()


def test_a_table_that_is_made_where_weights_are_comes_after_them(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder("llama")
    model, stock = octavo.load(folder, model_class=PlacedModel), PlacedModel.from_pretrained(folder, dtype="auto")
    assert model.lm_head.table.tolist() == [0, 1, 2, 3]
    assert torch.equal(model.lm_head.weight, stock.lm_head.weight)


def test_what_old_constructors_make_has_the_dtype_that_from_pretrained_gives_it(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [4, 4], "num_hidden_layers": 1}
    config = transformers.Wav2Vec2Config(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, num_conv_pos_embedding_groups=2, **sizes
    )
    transformers.Wav2Vec2Model(config).bfloat16().save_pretrained(tmp_path)
    stock = transformers.Wav2Vec2Model.from_pretrained(tmp_path, dtype="auto")
    model = octavo.load(tmp_path, model_class=transformers.Wav2Vec2Model)
    others = dict(stock.named_parameters()) | dict(stock.named_buffers())
    assert model.masked_spec_embed.dtype == torch.bfloat16
    assert all(torch.equal(tensor, others[name]) for name, tensor in kept(model).items())
    again = transformers.Wav2Vec2Model.from_pretrained(
        tmp_path, dtype="auto", quantization_config=octavo.OctavoConfig()
    )
    assert differences(model, again) == []
