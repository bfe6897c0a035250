"""torchao and compressed-tensors as what finishes a layer, on a real model: outputs are those of their ordinary use.

Ordinary use: the whole model in bf16, then quantized. Here: the model takes its weights one by one, and each layer is
given to the library the moment it is complete. The model is SmolLM2-135M (`octavo.demo.model`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import octavo
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.demo import model as demo_model
from octavo.errors import MissingExtraError, OctavoError

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from octavo.adapters.transformers.skeleton import skeleton

pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.timeout(600)]

Finish = Callable[[nn.Module], None]


@pytest.fixture(scope="module")
def folder(users_cache: Path) -> Path:
    try:
        return demo_model.prepare(users_cache)
    except (MissingExtraError, OctavoError) as error:
        pytest.skip(f"the demo model can't be had: {error}")


@pytest.fixture(scope="module")
def tokens(folder: Path) -> Tensor:
    from transformers import AutoTokenizer

    found: Tensor = AutoTokenizer.from_pretrained(folder)(demo_model.EVAL_TEXT, return_tensors="pt").input_ids[:, :96]
    return found


def quantized_ordinarily(folder: Path, quantize: Callable[[Any], None]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    quantize(model)
    return model


def quantized_layer_by_layer(folder: Path, finish: Callable[[Any], Finish]) -> tuple[Any, Any]:
    model = skeleton(Checkpoint.open(folder))
    model.tie_weights()
    session = octavo.layerwise(model, finish(model), "cpu")
    with session, safe_open(folder / "model.safetensors", "pt") as file:
        session.load((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    return model, session


def assert_same_outputs(mine: Any, theirs: Any, tokens: Tensor, session: Any) -> None:
    with torch.no_grad():
        a, b = mine(tokens).logits, theirs(tokens).logits
    assert torch.equal(a, b)
    linears = [name for name, module in mine.named_modules() if isinstance(module, nn.Linear)]
    finished = [event.layer for event in session.events if event.kind == "finish"]
    assert set(linears) <= set(finished)
    assert len(finished) == len(set(finished))
    report = session.report
    assert report.final_bytes < 0.75 * report.loaded_bytes  # embeddings stay
    assert report.peak_bytes < report.final_bytes + 2 * max(layer.loaded_bytes for layer in report.layers)
    assert report.finish_s > 0


def is_quantized(model: Any, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module is not model.lm_head


def test_torchao(folder: Path, tokens: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
        config = quantization.Float8WeightOnlyConfig()

        def ordinary(model: Any) -> None:
            quantization.quantize_(model, config, filter_fn=lambda module, name: is_quantized(model, module))

        def finish(model: Any) -> Finish:
            def one(layer: nn.Module) -> None:
                if is_quantized(model, layer):
                    quantization.quantize_(layer, config)

            return one

        theirs = quantized_ordinarily(folder, ordinary)
        mine, session = quantized_layer_by_layer(folder, finish)
        weight = mine.model.layers[3].mlp.up_proj.weight
        assert type(weight) is type(theirs.model.layers[3].mlp.up_proj.weight) is not nn.Parameter
        assert_same_outputs(mine, theirs, tokens, session)


def test_compressed_tensors(folder: Path, tokens: Tensor) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import compress_module, decompress_module
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, initialize_module_for_quantization
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False)

    def quantize(layer: nn.Module) -> None:
        initialize_module_for_quantization(layer, QuantizationScheme(targets=["Linear"], weights=arguments))
        low, high = layer.weight.data.amin(1, keepdim=True), layer.weight.data.amax(1, keepdim=True)
        scale, _ = calculate_qparams(low, high, arguments)
        layer.weight_scale.data.copy_(scale)
        compress_module(layer)

    def ordinary(model: Any) -> None:
        for module in list(model.modules()):
            if is_quantized(model, module):
                quantize(module)

    def finish(model: Any) -> Finish:
        return lambda layer: quantize(layer) if is_quantized(model, layer) else None

    theirs = quantized_ordinarily(folder, ordinary)
    mine, session = quantized_layer_by_layer(folder, finish)
    a, b = mine.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert a["model.layers.3.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    for name, tensor in b.items():
        assert torch.equal(a[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for model in (mine, theirs):  # the library computes with weights that it has decompressed
        for module in list(model.modules()):
            decompress_module(module)
    assert_same_outputs(mine, theirs, tokens, session)
