"""int8 and NVFP4 through octavo, as stock SGLang reads them of a conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import octavo
from helpers.folders import edit_tensors
from helpers.sglang_checkpoints import make
from helpers.sglang_loading import Job, load, load_ranks, octavo_job
from octavo.adapters.sglang.options import Options

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("sglang_loads"),
]
#: a checkpoint's tensors, all at once
WHOLE: list[list[str]] = [[]]


@pytest.fixture
def reads_nvfp4() -> None:
    if "nvfp4" not in Options.offered():
        pytest.skip("this SGLang reads no nvfp4")


def converted(source: Path, scheme: str, **recipe: list[str]) -> Path:
    target = source.with_name(f"{source.name}-{scheme}")
    form = "compressed-tensors-w8a8" if scheme == "int8_channel" else "compressed-tensors"
    octavo.convert(source, target, octavo.Recipe(scheme, **recipe), format=form, prove=False)
    return target


@pytest.mark.parametrize("ranks", [1, 2])
def test_int8_is_what_stock_makes_of_the_conversion(ranks: int, tmp_path: Path) -> None:
    """Experts stay: SGLang has int8 for them on NPUs alone."""
    dense, experts = make("qwen2 wide", tmp_path / "dense"), make("deepseek_v2 wide", tmp_path / "experts")
    jobs = [
        octavo_job(dense, "int8_channel"),
        Job(converted(dense, "int8_channel")),
        octavo_job(experts, "int8_channel"),
        Job(converted(experts, "int8_channel", ignore=["*.mlp.experts.*"])),
    ]
    answers = load_ranks(ranks, *jobs, timeout=850)
    for mine, stock in (pair for ways in (answers[:2], answers[2:]) for pair in zip(*ways, strict=True)):
        for answer in (mine, stock):
            assert not answer.error, answer.output[-4000:]
        assert sum("torch.int8" in digest for digest in stock.loaded.values()) > 4
        assert (mine.loaded, mine.served) == (stock.loaded, stock.served)


@pytest.mark.usefixtures("reads_nvfp4")
@pytest.mark.parametrize("ranks", [1, 2])
def test_nvfp4_is_what_stock_makes_of_the_conversion(ranks: int, tmp_path: Path) -> None:
    """Before and after SGLang brings it into the form of its kernels, the last step of which stands in for Marlin's."""
    jobs = []
    for name in ("phi3 wide", "qwen2_moe wide"):
        source = make(name, tmp_path / name.replace(" ", "-"))
        jobs += [octavo_job(source, "nvfp4"), Job(converted(source, "nvfp4"))]
    answers = load_ranks(ranks, *jobs, timeout=850)
    for mine, stock in (pair for ways in (answers[:2], answers[2:]) for pair in zip(*ways, strict=True)):
        for answer in (mine, stock):
            assert not answer.error, answer.output[-4000:]
        assert sum("torch.uint8" in digest for digest in stock.loaded.values()) > 4
        assert mine.loaded == stock.loaded
        assert mine.served == stock.served != stock.loaded


@pytest.mark.usefixtures("reads_nvfp4")
def test_new_weights_become_nvfp4(tmp_path: Path) -> None:
    old, new = make("qwen2_moe", tmp_path / "old"), make("qwen2_moe", tmp_path / "new", seed=1)
    steps = [["update", way, str(folder), WHOLE] for way, folder in (("disk", new), ("last", old), ("tensors", new))]
    mine, fresh = load(octavo_job(old, "nvfp4", steps), octavo_job(new, "nvfp4"), timeout=850)
    for answer in (mine, fresh):
        assert not answer.error, answer.output[-4000:]
    for (answers, now, in_place), expected in zip(mine.results, (fresh, mine, fresh), strict=True):
        assert answers[0][0], answers
        assert now == expected.served
        assert in_place
    assert mine.served != fresh.served


LARGE = ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.experts.2.up_proj.weight")


def far(tensors: dict[str, Tensor]) -> None:
    """As large as the scales of a layer's other matrices can't be."""
    for name in tensors:
        if name.endswith("layers.0.self_attn.q_proj.weight"):
            tensors[name][0, 0] = 3.0e6


def near(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if name.endswith(LARGE):
            tensors[name][3, 5] = 20.0


@pytest.mark.usefixtures("reads_nvfp4")
def test_matrices_that_are_joined_get_one_global_scale_or_are_refused(tmp_path: Path) -> None:
    """Stock refuses a checkpoint in which they differ."""
    source = edit_tensors(make("qwen2_moe", tmp_path / "near"), near)
    apart = edit_tensors(make("qwen2_moe", tmp_path / "far"), far)
    steps = [["update", "last", str(apart), WHOLE]]
    mine, stock, refused = load(
        octavo_job(source, "nvfp4", steps), Job(converted(source, "nvfp4")), octavo_job(apart, "nvfp4"), timeout=850
    )
    assert not mine.error, mine.output[-4000:]
    assert "share one weight_global_scale" in stock.error
    layer = "model.layers.0.self_attn.qkv_proj"
    assert {k for k in stock.loaded if mine.loaded[k] != stock.loaded[k]} <= {
        f"{layer}.weight_scale",
        f"{layer}.weight_global_scale",
    }
    assert f"{layer} joins matrices whose global scales are too far apart" in refused.error
    ((done, message),), now, _ = mine.results[0]
    assert not done
    assert f"{layer}: with its new weights, it joins matrices" in message
    assert {key: now[key] for key in now if layer in key} == {key: mine.served[key] for key in now if layer in key}


def test_nvfp4_is_refused_by_name_where_it_is_not_read(tmp_path: Path) -> None:
    if "nvfp4" in Options.offered():
        pytest.skip("this SGLang reads nvfp4")
    source = make("llama", tmp_path / "bf16")
    mine, flagged, stock = load(
        octavo_job(source, "nvfp4"), Job(source, {"quantization": "octavo_nvfp4"}), Job(converted(source, "nvfp4"))
    )
    for answer in (mine, flagged):
        assert "the scheme nvfp4 is not offered in SGLang: this one reads no weights in nvfp4" in answer.error
        assert "Use fp8_channel or fp8_block or int8_channel" in answer.error
    assert stock.error
