"""Converting: the same bytes by however many threads, from wherever they lie, and as loading has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _sources import (
    CONFIG,
    MIB,
    assert_same,
    by_case,
    by_scheme,
    convert,
    digests,
    expected,
    raw_bytes,
    read_all,
    source_tensors,
    write_by_hand,
)
from torch import Tensor

import octavo
from helpers import random_weights, same_bytes, write_checkpoint
from helpers.models import state_of
from helpers.stock import unpacked
from octavo.checkpoint import dtypes
from octavo.errors import DeviceError
from octavo.numerics import schemes

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "no_waiting_for_the_disk")


@by_case
def test_files_do_not_depend_on_threads_or_staging(
    sources: Callable[[str], Path], format: str, scheme: str, tmp_path: Path
) -> None:
    wanted = None
    for number, (threads, staging) in enumerate(
        [(None, 256 * MIB), (1, MIB), (2, 3 * MIB), (7, 3 * MIB), (16, 64 * MIB)]
    ):
        dst = tmp_path / str(number)
        convert(sources("sharded"), dst, scheme, format=format, threads=threads, staging_bytes=staging)
        wanted = wanted or digests(dst)
        assert digests(dst) == wanted, (threads, staging)


def test_staging_stays_within_its_budget(sources: Callable[[str], Path], tmp_path: Path) -> None:
    for staging in (MIB, 5 * MIB, 256 * MIB):
        report = convert(sources("single"), tmp_path / str(staging), staging_bytes=staging)
        assert report.staging_bytes <= staging


def test_staging_below_a_mebibyte_is_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="1 MiB"):
        convert(sources("single"), tmp_path / "out", staging_bytes=MIB - 1)
    assert not (tmp_path / "out").exists()


def test_more_threads_than_staging_has_room_for_are_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="4000 threads need staging_bytes of at least"):
        convert(sources("single"), tmp_path / "out", threads=4_000, staging_bytes=MIB)
    assert not (tmp_path / "out").exists()


def test_zero_threads_are_refused(sources: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="at least 1"):
        convert(sources("single"), tmp_path / "out", threads=0)


@pytest.mark.parametrize("pad", range(8))
def test_source_data_may_lie_at_any_address(pad: int, tmp_path: Path) -> None:
    tensors = source_tensors()
    entries = {name: (dtypes.NAMES[t.dtype], tuple(t.shape), raw_bytes(t)) for name, t in tensors.items()}
    source = write_by_hand(tmp_path / "source" / "model.safetensors", entries, pad)
    convert(source, tmp_path / "out", "mxfp8")
    assert_same(read_all(tmp_path / "out"), expected(tensors, "compressed-tensors", "mxfp8"))


@pytest.mark.parametrize("name", ["a b.weight", 'quo"te\\.weight', "größe.層.weight", "x" * 300 + ".weight", ".weight"])
def test_any_name_survives(name: str, tmp_path: Path) -> None:
    tensors = {name: random_weights((8, 32), torch.bfloat16, 0)}
    source = write_checkpoint(tmp_path / "source", tensors, 1, CONFIG)
    convert(source, tmp_path / "out")
    q, scale = schemes.quantize(tensors[name], "fp8_channel")
    assert_same(read_all(tmp_path / "out"), {name: q, f"{name}_scale": scale})
    assert octavo.verify(tmp_path / "out", source).ok


@by_scheme
def test_loaded_linear_weights_are_the_converted_ones(scheme: str, tmp_path: Path) -> None:
    from _models import make_checkpoint

    source = make_checkpoint("llama", tmp_path / "source", hidden_size=160, intermediate_size=224)
    octavo.convert(source, tmp_path / "out", scheme)
    written, state = unpacked(read_all(tmp_path / "out")), state_of(octavo.load(source, scheme))
    compared = 0
    for name, tensor in written.items():
        if name.endswith("_scale") or f"{name}_scale" not in written:
            continue
        scale = written[f"{name}_scale"]
        assert same_bytes(state[name], tensor), name
        loaded = state[f"{name}_scale"]
        scale = scale.float() if scale.dtype == torch.bfloat16 else scale
        assert torch.equal(loaded.reshape(-1).view(torch.uint8), scale.reshape(-1).view(torch.uint8)), name
        compared += 1
    assert compared == 14  # 7 in each layer


@by_scheme
def test_loaded_expert_stacks_are_the_converted_experts(scheme: str, tmp_path: Path) -> None:
    from _models import make_checkpoint

    source = make_checkpoint("qwen3_moe", tmp_path / "source", moe_intermediate_size=160, hidden_size=64)
    # of experts in nvfp4, transformers 5.23 drops the global scale, so that it would keep them
    octavo.convert(source, tmp_path / "out", scheme, prove=scheme != "nvfp4")
    written, state = unpacked(read_all(tmp_path / "out")), state_of(octavo.load(source, scheme))

    def bits(tensor: Tensor) -> Tensor:
        tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    for layer in (0, 1):
        prefix = f"model.layers.{layer}.mlp.experts"
        for stack, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            weight, scale = state[f"{prefix}.{stack}"], state[f"{prefix}.{stack}_scale"]
            for expert in range(weight.shape[0]):
                names = [f"{prefix}.{expert}.{part}.weight" for part in parts]
                assert torch.equal(bits(weight[expert]), torch.cat([bits(written[name]) for name in names]))
                assert torch.equal(bits(scale[expert]), torch.cat([bits(written[f"{name}_scale"]) for name in names]))
