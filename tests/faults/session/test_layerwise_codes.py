"""FP8 that a loader takes without its scales never becomes weights; with them, it does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import same_bytes, write_checkpoint
from helpers.layerwise import assert_quantized, one_linear
from octavo.errors import LoaderError, UpdateError
from octavo.numerics import schemes
from octavo.session import Session

WEIGHT = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
NUMBERS, SCALE = schemes.quantize(WEIGHT, "fp8_channel")
PAIRS = [("a.weight", NUMBERS), ("a.weight_scale", SCALE)]
Pairs = Iterable[tuple[str, Tensor]]
REFUSED = r"a\.weight: a loader copies e4m3fn to it, whose numbers mean nothing without their scales.*octavo\.stream"


def in_halves(weight: Tensor, codes: Tensor) -> None:
    for rows in (slice(0, 64), slice(64, 128)):
        weight[rows].copy_(codes[rows].to(weight.dtype))


def staged(weight: Tensor, codes: Tensor) -> None:
    memory = torch.empty(128, 64)
    memory.copy_(codes)
    weight.copy_(memory)


def by_index(weight: Tensor, codes: Tensor) -> None:
    weight[torch.arange(128)] = codes.to(weight.dtype)


def out(weight: Tensor, codes: Tensor) -> None:
    torch.cat([codes[:64].bfloat16(), codes[64:].bfloat16()], out=weight)


def padded(weight: Tensor, codes: Tensor) -> None:
    weight.copy_(torch.cat([codes[:100].bfloat16(), torch.zeros(28, 64, dtype=torch.bfloat16)]))


WAYS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "as it is": lambda weight, codes: weight.copy_(codes),
    "cast": lambda weight, codes: weight.copy_(codes.to(weight.dtype)),
    "by way of fp32": lambda weight, codes: weight.copy_(codes.float().bfloat16().clone()),
    "transposed": lambda weight, codes: weight.copy_(codes.T.contiguous().bfloat16().T),
    "in halves": in_halves,
    "staged": staged,
    "by index": by_index,
    "out": out,
    "padded": padded,
    "int8": lambda weight, codes: weight.copy_(codes.view(torch.int8).float()),
}


def take(pairs: Pairs, way: str, model: Any) -> None:
    for name, tensor in pairs:
        if name == "a.weight":
            WAYS[way](model["a"].weight.data, tensor)


@pytest.mark.parametrize("finish", ["fp8_block", None, lambda layer: None], ids=["scheme", "None", "function"])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_without_scales_are_refused_however_they_come(way: str, finish: Any) -> None:
    text = REFUSED.replace("e4m3fn", "int8") if way == "int8" else REFUSED
    session = Session(model := one_linear(128), finish)
    with pytest.raises(LoaderError, match=text), session:
        take(session.pairs(PAIRS), way, model)


@pytest.mark.parametrize("way", ["cast", "as it is"])
def test_an_update_refuses_them_and_changes_nothing(way: str) -> None:
    with Session(model := one_linear(128), "fp8_channel") as session:
        session.load([("a.weight", WEIGHT)])
    with pytest.raises(UpdateError, match=REFUSED), session:
        WAYS[way](model["a"].weight.data, NUMBERS.clone())
    assert_quantized(model["a"], WEIGHT, "fp8_channel")


def test_a_parameter_that_a_loader_registers_is_no_way_around() -> None:
    with pytest.raises(LoaderError, match=REFUSED), Session(model := one_linear(128), None):
        model["a"].weight = nn.Parameter(NUMBERS.bfloat16())


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_what_a_loader_multiplies_with_their_scales_are_weights(in_place: bool, direct: bool) -> None:
    taken: dict[str, Tensor] = {}
    with Session(model := one_linear(128), "fp8_block", direct=direct) as session:
        for name, tensor in session.pairs(PAIRS):
            taken[name] = tensor
        wide, scale = taken["a.weight"].float(), taken["a.weight_scale"].float().reshape(-1, 1)
        model["a"].weight.data.copy_(wide.mul_(scale) if in_place else wide * scale)
    assert_quantized(model["a"], schemes.dequantize(NUMBERS, SCALE, "fp8_channel").bfloat16(), "fp8_block")


def test_memory_that_codes_were_in_takes_weights_again() -> None:
    memory = torch.empty(128, 64, dtype=torch.bfloat16)
    with Session(model := one_linear(128), "fp8_channel") as session:
        for _, tensor in session.pairs([("codes", NUMBERS), ("a.weight", WEIGHT)]):
            memory.copy_(tensor)
        model["a"].weight.data.copy_(memory)
    assert_quantized(model["a"], WEIGHT, "fp8_channel")


def test_a_model_of_fp8_takes_numbers_and_their_scales_as_they_are() -> None:
    model = nn.ModuleDict({"a": nn.Module()})
    model["a"].weight = nn.Parameter(torch.empty_like(NUMBERS), requires_grad=False)
    model["a"].weight_scale = nn.Parameter(torch.empty(128, 4), requires_grad=False)
    scale = torch.rand(128, 4).to(schemes.FP8)  # of NVFP4, whose scales are FP8
    with Session(model, None) as session:
        session.load([("a.weight", NUMBERS), ("a.weight_scale", scale)])
    assert same_bytes(model["a"].weight.data, NUMBERS)
    assert same_bytes(model["a"].weight_scale.data, scale.float())


@pytest.mark.parametrize(("scheme", "said"), [("fp8_channel", "e4m3fn"), ("int8_channel", "int8")])
def test_a_recording_leaves_them_to_the_loader_which_is_refused(scheme: str, said: str, tmp_path: Path) -> None:
    numbers, scale = schemes.quantize(WEIGHT, scheme)
    folder = write_checkpoint(tmp_path, {"a.weight": numbers, "a.weight_scale": scale})
    for way in ("as it is", "cast"):
        session = Session(model := one_linear(128), None)
        plan = session.record(folder, functools.partial(take, way=way, model=model))
        with pytest.raises(LoaderError, match=REFUSED.replace("e4m3fn", said)):
            session.stream(plan)
