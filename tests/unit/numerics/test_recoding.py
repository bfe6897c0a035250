"""FP8 recoded by integers has the bytes that decoding and quantizing give."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from helpers import same_bytes
from octavo.checkpoint.codings import Decoding
from octavo.numerics import recoding, schemes
from octavo.numerics.decoding import decode_into, row_amax
from octavo.numerics.recoding import AT_ONCE, recode_into, recodes
from octavo.numerics.schemes import FP8

CHANNEL = schemes.get("fp8_channel")


def by_definition(
    codes: torch.Tensor, scale: torch.Tensor, target: torch.Tensor, group: int, phase: int
) -> torch.Tensor:
    wide, out = torch.empty(codes.shape), torch.empty_like(codes)
    decode_into(wide, codes, scale, Decoding("float8", 1, group), phase=(0, phase))
    schemes.quantize_in_place(out, wide, target, CHANNEL)
    return out


def recoded(
    codes: torch.Tensor, scale: torch.Tensor, target: torch.Tensor, group: int, phase: int = 0
) -> torch.Tensor | None:
    out, room = torch.empty_like(codes), max(-(-codes.numel() // 64) * 64 // AT_ONCE, 16 * scale.numel())
    scratch = torch.empty(room), torch.empty(room)
    found = recode_into(out, codes, scale, target, Decoding("float8", 1, group), phase=phase, scratch=scratch)
    return out if found else None


def test_every_code_is_rounded_as_by_float32_next_to_every_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recoding, "_MOST_ODD", 1.0)
    codes = torch.tensor([byte for byte in range(256) if byte & 0x7F != 0x7F], dtype=torch.uint8).view(FP8)
    # between two numbers of four bits; over each that a code may have: at these ratios of scales a product is a tie
    ties = [k + 0.5 for k in range(8, 16)] + [k + 1.0 for k in range(16, 32, 2)]
    ratios = {math.frexp(tie / own)[0] for tie, own in itertools.product(ties, range(8, 16))} | {1.0}
    target = torch.arange(128, 256, 5).float().repeat_interleave(len(ratios))
    scale = target * torch.tensor(sorted(ratios)).repeat(len(target) // len(ratios))
    bits = scale.view(torch.int32)
    scale = torch.cat([(bits + step).view(torch.float32) for step in range(-2, 3)]).clamp_(max=target.repeat(5))
    target, scale = target.repeat(5)[:, None], scale[:, None]
    every = codes.expand(len(scale), -1).contiguous()
    for exponent in (0, -3, -9):
        found = recoded(every, scale * 2.0**exponent, target, 254)
        assert found is not None
        assert same_bytes(found, by_definition(every, scale * 2.0**exponent, target, 254, 0))


@pytest.mark.parametrize(("columns", "phase"), [(256, 0), (300, 40), (77, 0), (100, 100), (515, 127)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_boxes_that_begin_and_end_anywhere(columns: int, phase: int, contiguous: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    weights = torch.randn(2, 9, columns + 3, generator=generator) * 30
    codes = weights.to(FP8)[..., :columns]
    codes = codes.contiguous() if contiguous else codes
    scale = torch.exp(torch.randn(2, 9, -(-(columns + phase) // 128), generator=generator))
    rows = schemes.scale_from_amax(row_amax(codes, scale, Decoding("float8", 1, 128), phase=phase), CHANNEL)
    for target in (rows, rows.amax(-2, keepdim=True)):
        found = recoded(codes, scale, target, 128, phase)
        assert found is not None
        assert same_bytes(found, by_definition(codes, scale, target, 128, phase))


@pytest.mark.parametrize("scale", [2.0**-130, 2.0**-112])
def test_products_that_are_subnormal_are_left_to_the_definition(scale: float) -> None:
    codes = torch.full((1, 128), 3.5).to(FP8)
    assert recoded(codes, torch.full((1, 1), scale), torch.full((1, 1), scale), 128) is None


def test_many_that_are_not_normal_are_left_to_the_definition() -> None:
    codes = torch.ones(4, 256).to(FP8)
    ones = torch.ones(4, 2)
    assert recoded(codes, ones, ones[:, :1], 128) is not None
    codes[:, ::16] = 0
    assert recoded(codes, ones, ones[:, :1], 128) is None


@pytest.mark.parametrize(
    ("dtype", "group", "scheme", "expected"),
    [
        (FP8, 128, "fp8_channel", True),
        (FP8, None, "fp8_tensor", True),
        (FP8, 32, "fp8_channel", False),  # eight products for 32 codes
        (FP8, 128, "fp8_block", False),
        (FP8, None, "mxfp8", False),
        (FP8, 128, "int8_channel", False),
        (torch.float8_e5m2, 128, "fp8_channel", False),
    ],
)
def test_what_is_recoded(dtype: torch.dtype, group: int | None, scheme: str, expected: bool) -> None:
    assert recodes(dtype, Decoding("float8", 1, group), schemes.get(scheme)) is expected
