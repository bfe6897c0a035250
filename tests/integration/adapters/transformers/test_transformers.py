"""octavo and transformers: the same model, loaded both ways, down to the bit.

Without quantization, every parameter and buffer must equal ``from_pretrained``'s. With it, weights must equal what
`octavo.schemes` makes of each checkpoint tensor alone, logits those of the same model with dequantized weights, and the
two routes (`octavo.load` and `OctavoConfig`) each other.
"""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import (
    ARCHITECTURES,
    QUANTIZED,
    SCHEMES,
    Checkpoints,
    by_architecture,
    by_case,
    by_quantized,
    by_scheme,
    is_transposed,
    logits,
    make_checkpoint,
    prompt,
    relative_error,
    stacks_of,
)
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import octavo
from helpers import same_bytes
from helpers.folders import tensors_of
from helpers.models import differences, state_of
from octavo.numerics import schemes
from octavo.running.modules import quantized_weights, scale_name

# how per-expert tensors of a layer are called in checkpoints: (gate, up, down)
_PER_EXPERT = {
    "qwen2_moe": (
        "mlp.experts.{}.gate_proj.weight",
        "mlp.experts.{}.up_proj.weight",
        "mlp.experts.{}.down_proj.weight",
    ),
    "mixtral": tuple(f"block_sparse_moe.experts.{{}}.{w}.weight" for w in ("w1", "w3", "w2")),
}
_PER_EXPERT["qwen3_moe"] = _PER_EXPERT["deepseek_v3"] = _PER_EXPERT["qwen2_moe"]


# -- without quantization ---------------------------------------------------------------------------------------------


@by_architecture
def test_unquantized_load_is_bit_equal_to_from_pretrained(checkpoints: Checkpoints, architecture: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(checkpoints.folder(architecture))
    model = checkpoints.load(architecture, None)
    assert type(model) is type(reference)
    assert differences(model, reference) == []
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    assert model.generation_config.max_new_tokens == 7
    assert not model.training
    assert torch.equal(logits(model), logits(reference))


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_fp16_and_fp32_checkpoints_load_like_from_pretrained(
    checkpoints: Checkpoints, architecture: str, dtype: torch.dtype
) -> None:
    folder = checkpoints.folder(architecture, dtype)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    others = {name: t.dtype for name, t in tensors_of(folder).items() if t.ndim > 1 and t.dtype != dtype}
    # routers of some models are float32 in 5.24, whatever the rest is in
    assert all(name.endswith(".gate.weight") for name in others), others
    assert others == {name: reference.get_parameter(name).dtype for name in others}
    assert reference.dtype == dtype
    assert differences(octavo.load(folder, scheme=None), reference) == []


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_dtype_override_casts_like_from_pretrained(
    checkpoints: Checkpoints, architecture: str, dtype: torch.dtype
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(checkpoints.folder(architecture), dtype=dtype)
    model = checkpoints.load(architecture, None, dtype)
    assert model.dtype == dtype == model.config.dtype
    assert differences(model, reference) == []


def test_dtype_override_may_be_a_name(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder("llama")
    assert octavo.load(folder, scheme=None, dtype="float16").dtype == torch.float16
    assert octavo.load(folder, scheme=None, dtype="auto").dtype == torch.bfloat16


@by_architecture
def test_attention_implementation_is_honoured(checkpoints: Checkpoints, architecture: str) -> None:
    model = octavo.load(checkpoints.folder(architecture), attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_model_class_is_honoured(checkpoints: Checkpoints) -> None:
    from transformers import AutoModel, LlamaModel

    folder = checkpoints.folder("llama")
    reference = AutoModel.from_pretrained(folder)
    for model_class in (AutoModel, LlamaModel):
        # the base model has no place for the output head
        model = octavo.load(folder, scheme=None, model_class=model_class, strict=False)
        assert type(model) is LlamaModel
        assert differences(model, reference) == []
        assert list(model.load_report.unused) == ["lm_head.weight"]


# -- what becomes of weights ------------------------------------------------------------------------------------------


@by_quantized
@by_scheme
def test_quantized_weights_equal_each_checkpoint_tensor_quantized_alone(
    checkpoints: Checkpoints, architecture: str, scheme: str
) -> None:
    model, source = checkpoints.load(architecture, scheme), tensors_of(checkpoints.folder(architecture))
    state = state_of(model)
    checked = 0
    for name, found_scheme, parts in quantized_weights(model):
        assert found_scheme == scheme
        assert state[name].dtype == schemes.get(scheme).dtype
        weight, scale = state[name], state[scale_name(name)]
        if name in source:  # one tensor, one parameter
            tensor = source[name].transpose(-1, -2) if is_transposed(model, name) else source[name]
            q, s = schemes.quantize(tensor, scheme)
            assert same_bytes(weight, q), name
            assert same_bytes(scale, s), name
        elif architecture in _PER_EXPERT:
            layer, _, leaf = name.rpartition(".mlp.experts.")
            gate, up, down = _PER_EXPERT[architecture]
            templates = [gate, up] if leaf == "gate_up_proj" else [down]
            assert len(parts) == len(templates)
            for expert in range(weight.shape[0]):
                alone = [schemes.quantize(source[f"{layer}.{t.format(expert)}"], scheme) for t in templates]
                assert same_bytes(weight[expert], torch.cat([q for q, _ in alone])), f"{name}[{expert}]"
                scales = torch.cat([s.reshape(-1, scale.shape[-1]) for _, s in alone])
                assert same_bytes(scale[expert], scales), f"{name}[{expert}]"
        else:  # GraniteMoE: one stack, renamed
            assert architecture == "granitemoe"
            leaf = "input_linear" if name.endswith("gate_up_proj") else "output_linear"
            renamed = f"{name.rpartition('.experts.')[0]}.{leaf}.weight"
            q, s = schemes.quantize(source[renamed], scheme)
            assert same_bytes(weight, q)
            assert same_bytes(scale, s)
        checked += 1
    assert checked


@by_quantized
def test_every_decoder_linear_and_expert_stack_is_quantized(checkpoints: Checkpoints, architecture: str) -> None:
    model = checkpoints.load(architecture, "fp8_channel")
    for path, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            leaf = path.rpartition(".")[-1]
            assert leaf in ("lm_head", "gate", "router", "shared_expert_gate", "layer"), path
    stacks = {name for name, *_ in stacks_of(model)}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and not name.endswith("_scale"):
            assert name in stacks
    assert bool(stacks) == (architecture not in ("opt", "llama", "phi3", "gemma2", "qwen3"))


@by_case(QUANTIZED)
def test_fp8_model_equals_the_same_model_with_dequantized_weights(
    checkpoints: Checkpoints, architecture: str, scheme: str
) -> None:
    model = checkpoints.load(architecture, scheme, torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(checkpoints.folder(architecture), dtype=torch.float32)
    state, reference_state = state_of(model), dict(reference.named_parameters())
    with torch.no_grad():
        for name, found_scheme, parts in quantized_weights(model):
            weight = schemes.dequantize(state[name], state[scale_name(name)], found_scheme, parts)
            weight = weight.transpose(-1, -2) if is_transposed(model, name) else weight
            target = reference_state[name]
            # a fp8 number is within 1/16 of its own, mx groups saturate
            assert (weight - target).abs().max() <= target.abs().max() / 8
            target.copy_(weight)
    assert relative_error(logits(model), logits(reference)) < 1e-5


@by_quantized
@by_scheme
def test_fp8_model_stays_close_to_the_bf16_model(checkpoints: Checkpoints, architecture: str, scheme: str) -> None:
    fp8, bf16 = logits(checkpoints.load(architecture, scheme)), logits(checkpoints.load(architecture, None))
    assert fp8.dtype == torch.bfloat16
    assert relative_error(fp8, bf16) < 0.2  # random weights, and routers that may choose other experts


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe"])
@by_scheme
def test_fp16_and_fp32_checkpoints_are_quantized_from_their_own_values(
    checkpoints: Checkpoints, architecture: str, dtype: torch.dtype, scheme: str
) -> None:
    folder = checkpoints.folder(architecture, dtype)
    model, source = octavo.load(folder, scheme=scheme), tensors_of(folder)
    state = state_of(model)
    for name, *_ in quantized_weights(model):
        if name in source:
            q, s = schemes.quantize(source[name], scheme)
            assert same_bytes(state[name], q)
            assert same_bytes(state[scale_name(name)], s)
    assert logits(model).isfinite().all()


@by_scheme
def test_dtype_override_does_not_change_quantized_bytes(checkpoints: Checkpoints, scheme: str) -> None:
    plain, wide = (state_of(checkpoints.load("qwen2_moe", scheme, dtype)) for dtype in (None, torch.float32))
    for name, *_ in quantized_weights(checkpoints.load("qwen2_moe", scheme)):
        assert same_bytes(plain[name], wide[name])
        assert same_bytes(plain[scale_name(name)], wide[scale_name(name)])


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_conv1d_weights_stay_untouched(checkpoints: Checkpoints, scheme: str | None) -> None:
    model, source = checkpoints.load("gpt2", scheme), tensors_of(checkpoints.folder("gpt2"))
    assert list(quantized_weights(model)) == []
    state = state_of(model)
    for name, tensor in source.items():
        assert same_bytes(state[name if name in state else f"transformer.{name}"], tensor), name
    reasons = " ".join(model.load_report.kept)
    assert "Conv1D" in reasons


@pytest.mark.parametrize("architecture", ["opt", "gemma2", "gpt2"])
@pytest.mark.parametrize("scheme", [None, "fp8_channel"])
def test_tied_embeddings_share_one_storage(checkpoints: Checkpoints, architecture: str, scheme: str | None) -> None:
    folder = checkpoints.folder(architecture)
    assert "lm_head.weight" not in tensors_of(folder)
    config = octavo.OctavoConfig(scheme) if scheme else None
    for model in (
        checkpoints.load(architecture, scheme),
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config),
    ):
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert head is embedding
        assert head.dtype == torch.bfloat16


@pytest.mark.parametrize("head", ["instead of the embedding", "equal", "another"])
def test_tied_weights_of_odd_checkpoints_are_those_of_from_pretrained(head: str, tmp_path: Path) -> None:
    folder = make_checkpoint("llama", tmp_path, tie_word_embeddings=True)
    tensors = tensors_of(folder)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.flip(0) if head == "another" else embedding.clone()
    if head.startswith("instead"):
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, expected = octavo.load(folder, None), AutoModelForCausalLM.from_pretrained(folder)
    assert differences(model, expected) == []
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (head != "another")


def test_models_that_are_loaded_at_once_leave_torch_as_it_was(checkpoints: Checkpoints) -> None:
    folder, numbers = checkpoints.folder("llama"), itertools.count()
    second_builds, first_is_built = threading.Event(), threading.Event()

    class Overlapping(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            if next(numbers):
                second_builds.set()
                first_is_built.wait(0.5)
            else:
                second_builds.wait(0.5)

    def build() -> Any:
        model = octavo.load(folder, model_class=Overlapping)
        first_is_built.set()
        return model

    with ThreadPoolExecutor(2) as pool:
        one, other = [built.result() for built in [pool.submit(build) for _ in range(2)]]
    assert differences(one, other) == []
    layer = nn.Linear(2, 2)
    assert not layer.weight.is_meta
    assert torch.equal(nn.init.ones_(layer.weight), torch.ones(2, 2))
    assert torch.get_default_dtype() == torch.float32


# -- the route through from_pretrained --------------------------------------------------------------------------------


@by_case(ARCHITECTURES)
def test_from_pretrained_with_octavo_config_equals_load(
    checkpoints: Checkpoints, architecture: str, scheme: str
) -> None:
    config = octavo.OctavoConfig(scheme)
    model = AutoModelForCausalLM.from_pretrained(checkpoints.folder(architecture), quantization_config=config)
    direct = checkpoints.load(architecture, scheme)
    assert differences(model, direct) == []
    assert list(quantized_weights(model)) == list(quantized_weights(direct))
    assert torch.equal(logits(model), logits(direct))
    assert model.load_report.final_bytes == direct.load_report.final_bytes
    assert model.load_report.kept == direct.load_report.kept
    assert model.load_report.notes == direct.load_report.notes


@by_architecture
def test_both_routes_agree_on_what_is_a_parameter_and_what_a_buffer(
    checkpoints: Checkpoints, architecture: str
) -> None:
    config = octavo.OctavoConfig()
    model = AutoModelForCausalLM.from_pretrained(checkpoints.folder(architecture), quantization_config=config)
    direct = checkpoints.load(architecture, "fp8_channel")
    assert dict(model.named_parameters()).keys() == dict(direct.named_parameters()).keys()
    assert dict(model.named_buffers()).keys() == dict(direct.named_buffers()).keys()


def test_octavo_config_honours_targets_and_ignore(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder("qwen2_moe")
    targets, ignore = {"*.experts.*": "fp8_block"}, ["*.self_attn.*"]
    config = octavo.OctavoConfig("fp8_channel", targets=targets, ignore=ignore)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    direct = octavo.load(folder, octavo.Recipe("fp8_channel", targets, ignore))
    assert differences(model, direct) == []
    assert {name: scheme for name, scheme, _ in quantized_weights(model)} == {
        name: scheme for name, scheme, _ in quantized_weights(direct)
    }


def test_octavo_config_honours_device_map_and_dtype(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder("qwen2_moe")
    for device_map in ("cpu", {"": "cpu"}):
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=octavo.OctavoConfig(), device_map=device_map, dtype=torch.float32
        )
        assert differences(model, checkpoints.load("qwen2_moe", "fp8_channel", torch.float32)) == []


# -- use --------------------------------------------------------------------------------------------------------------


@by_architecture
def test_generate_works(checkpoints: Checkpoints, architecture: str) -> None:
    model = checkpoints.load(architecture, "fp8_channel")
    ids = model.generate(prompt()[:, :8], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids.shape == (2, 12)
    with torch.no_grad():
        last = model(ids[:, :-1]).logits[:, -1].float()
    # a row by itself is summed otherwise than with others, so of two that are nearly alike either may be chosen
    chosen = last.gather(-1, ids[:, -1:]).squeeze(-1)
    assert torch.all(last.amax(-1) - chosen <= 0.02 * last.std(-1))


def test_text_generation_pipeline_works(checkpoints: Checkpoints) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, pipeline

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(260)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2", unk_token="w0")
    generate = pipeline("text-generation", model=checkpoints.load("qwen2_moe", "fp8_channel"), tokenizer=tokenizer)
    # the pipeline writes its settings into the model's, hence explicit ones here
    [result] = generate("w5 w6 w7", max_new_tokens=3, do_sample=False)
    assert result["generated_text"].startswith("w5 w6 w7")


def test_quantized_layers_tell_their_scheme_when_printed(checkpoints: Checkpoints) -> None:
    text = repr(checkpoints.load("llama", "fp8_block"))
    assert "QuantizedLinear" in text
    assert "scheme=fp8_block" in text


# -- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
@by_scheme
def test_bytes_do_not_depend_on_threads_or_staging(checkpoints: Checkpoints, architecture: str, scheme: str) -> None:
    folder, direct = checkpoints.folder(architecture), checkpoints.load(architecture, scheme)
    for threads, staging_bytes in ((1, 1 << 20), (7, 6 << 20), (3, 64 << 20)):
        model = octavo.load(folder, scheme, threads=threads, staging_bytes=staging_bytes)
        assert model.load_report.threads == threads
        assert model.load_report.staging_bytes <= staging_bytes
        assert differences(model, direct) == []


def test_loading_leaves_torch_as_it_was(checkpoints: Checkpoints) -> None:
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
    octavo.load(checkpoints.folder("llama"))
    assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == before
