"""What SGLang holds after loading through octavo is what it holds after loading octavo's conversion, to the bit.

Before and after SGLang's post-processing: parameters, buffers, and what modules keep besides, such as the two matrices
that DeepSeek's attention makes of one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.folders import tensors_of
from helpers.sglang_checkpoints import convert, make
from helpers.sglang_loading import Answer, Job, digest, load, load_ranks, octavo_job
from helpers.vllm_checkpoints import convert as convert_as_it_is

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("sglang_loads"),
]

SCHEMES = ("fp8_channel", "fp8_block")
DENSE = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "opt")
EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "deepseek_v2", "deepseek_v3")
DENSE_WIDE, EXPERTS_WIDE = (tuple(f"{name} wide" for name in names) for names in (DENSE, EXPERTS))
WIDE = DENSE_WIDE + EXPERTS_WIDE
Pairs = dict[tuple[str, str], list[tuple[Answer, Answer]]]


def loaded(names: tuple[str, ...], folder: Path, ranks: int = 1, **options: int) -> Pairs:
    """Architecture and scheme -> of each rank, what octavo loads, and what stock loads of the conversion."""
    cases, jobs = [], []
    for name in names:
        source = make(name, folder / name.replace(" ", "-"))
        for scheme in SCHEMES:
            cases.append((name, scheme))
            jobs += [octavo_job(source, scheme, **options), Job(convert(source, scheme), dict(options))]
    answers = load_ranks(ranks, *jobs, timeout=850)
    pairs = zip(answers[::2], answers[1::2], strict=True)
    return {case: list(zip(*pair, strict=True)) for case, pair in zip(cases, pairs, strict=True)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return loaded(DENSE, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return loaded(EXPERTS, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return loaded(WIDE, tmp_path_factory.mktemp("two_ranks"), ranks=2)


@pytest.fixture(scope="module")
def expert_parallel(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return loaded(EXPERTS_WIDE, tmp_path_factory.mktemp("expert_parallel"), ranks=2, ep_size=2)


def check_equal(mine: Answer, stock: Answer) -> None:
    for answer in (mine, stock):
        assert not answer.error, answer.error
    assert any("float8_e4m3fn" in digest for digest in stock.loaded.values())
    assert mine.loaded == stock.loaded
    assert mine.served == stock.served


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", DENSE)
def test_dense_models_are_what_stock_makes_of_the_conversion(name: str, scheme: str, dense: Pairs) -> None:
    ((mine, stock),) = dense[name, scheme]
    check_equal(mine, stock)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", EXPERTS)
def test_mixtures_of_experts_are_what_stock_makes_of_the_conversion(name: str, scheme: str, experts: Pairs) -> None:
    ((mine, stock),) = experts[name, scheme]
    check_equal(mine, stock)
    assert all(".w_kc" in " ".join(answer.served) for answer in (mine, stock) if "deepseek" in name)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", WIDE)
def test_each_of_two_ranks_holds_what_stock_makes_of_the_conversion(name: str, scheme: str, two_ranks: Pairs) -> None:
    for mine, stock in two_ranks[name, scheme]:
        check_equal(mine, stock)
    (first, _), (second, _) = two_ranks[name, scheme]
    assert first.loaded != second.loaded


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", EXPERTS_WIDE)
def test_each_rank_with_experts_of_its_own_holds_what_stock_makes(
    name: str, scheme: str, expert_parallel: Pairs
) -> None:
    for mine, stock in expert_parallel[name, scheme]:
        check_equal(mine, stock)
        shapes = [text for name, text in mine.loaded.items() if name.endswith("experts.w13_weight")]
        assert shapes
        assert all(text.startswith("torch.float8_e4m3fn [2, ") for text in shapes)


@pytest.mark.parametrize("name", ["llama ragged", "qwen2 shared"])
def test_what_ranks_dont_divide_is_padded_or_shared_as_stock_does_it(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "bf16")
    for mine, stock in zip(
        *load_ranks(2, octavo_job(source), Job(convert(source, "fp8_channel")), timeout=500), strict=True
    ):
        check_equal(mine, stock)
        assert mine.loaded["model.embed_tokens.weight"].startswith("torch.bfloat16 [160, ")


def test_a_conversion_is_read_in_the_scheme_that_it_has_and_what_sglang_passes_over_is_named(tmp_path: Path) -> None:
    """Stock starts with memory that nothing was written to: it looks for Granite's experts by other names."""
    source, granite = make("qwen2_moe", tmp_path / "bf16"), make("granitemoe", tmp_path / "granite")
    converted, lost = (convert_as_it_is(each, "fp8_channel") for each in (source, granite))
    auto = {"load_format": "octavo"}
    mine, stock, refused, started = load(Job(converted, auto), Job(converted), Job(lost, auto), Job(lost))
    check_equal(mine, stock)
    assert "experts.w13_weight [4, 512, 128]: comes from no tensor of the checkpoint" in refused.error
    assert not started.error


def test_what_cant_be_fp8_in_sglang_stays_as_it_is_and_is_named(tmp_path: Path) -> None:
    """Rows and columns that blocks don't divide; gpt-oss, whose experts have other scales.

    For a scheme of blocks, SGLang makes 384 of 320 columns on a CPU: zeros, and then they are divided.
    """
    odd, gpt_oss = make("llama odd", tmp_path / "odd"), make("gpt_oss", tmp_path / "gpt_oss")
    channel, converted, block, strict, odd_wide, gpt, gpt_wide = load(
        octavo_job(odd),
        Job(convert(odd, "fp8_channel")),
        octavo_job(odd, "fp8_block"),
        octavo_job(odd, "fp8_block", extra={"strict": True}),
        Job(odd),
        octavo_job(gpt_oss),
        Job(gpt_oss),
    )
    check_equal(channel, converted)
    assert not block.error + odd_wide.error + gpt.error + gpt_wide.error
    assert "can't become FP8 in LlamaForCausalLM: SGLang can't make this layer in fp8_block" in strict.error
    padded = {name for name, text in block.loaded.items() if text != odd_wide.loaded.get(name)}
    blocks = tensors_of(convert(odd, "fp8_block"))
    for layer in (0, 1):
        down = f"model.layers.{layer}.mlp.down_proj.weight"
        wide = torch.nn.functional.pad(blocks[down].view(torch.uint8), (0, 64)).view(torch.float8_e4m3fn)
        assert block.loaded[down] == digest(wide)
        assert block.loaded[f"{down}_scale"] == digest(blocks[f"{down}_scale"])
        padded -= {down, f"{down}_scale", f"model.layers.{layer}.mlp.gate_up_proj.weight"}
    assert not padded
    assert gpt.loaded == gpt_wide.loaded
    assert "octavo: nothing in fp8_channel: all stays unquantized" in gpt.output


def test_tensors_named_by_ignore_stay_as_they_are(tmp_path: Path) -> None:
    source = make("qwen2_moe", tmp_path / "bf16")
    mine, everything, wide = load(
        octavo_job(source, extra={"ignore": ["model.layers.1.mlp.*", "model.layers.0.self_attn.o_proj.weight"]}),
        octavo_job(source),
        Job(source),
    )
    assert not mine.error, mine.error
    kept = {name for name, value in mine.loaded.items() if value == wide.loaded.get(name)}
    assert {name for name in wide.loaded if name.startswith("model.layers.1.mlp.")} <= kept
    assert "model.layers.0.self_attn.o_proj.weight" in kept
    rest = {name: value for name, value in mine.loaded.items() if name not in kept}
    assert rest == {name: everything.loaded[name] for name in rest}
    assert "model.layers.1.self_attn.qkv_proj.weight" in rest


def test_the_flag_for_quantization_does_the_same(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "bf16")
    flagged, asked = load(Job(source, {"quantization": "octavo_fp8_block"}), octavo_job(source, "fp8_block"))
    assert not flagged.error, flagged.error
    assert flagged.served == asked.served
    weight = tensors_of(convert(source, "fp8_block"))["model.layers.0.mlp.down_proj.weight"]
    assert flagged.loaded["model.layers.0.mlp.down_proj.weight"] == digest(weight)
