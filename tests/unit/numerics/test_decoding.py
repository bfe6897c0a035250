"""What stored numbers and scales stand for, and which scales are none."""

from __future__ import annotations

import pytest
import torch

from helpers import same_bytes
from octavo.checkpoint.codings import Decoding
from octavo.numerics.decoding import ORDERED, bad_scale, decode, decode_into, row_amax, scale_cells

BY_TENSOR = Decoding("float8", None, None)
ONE = torch.ones(1, 1)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
)
def test_every_fp8_number_is_what_torch_says(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).reshape(16, 16)
    wide = every.float()
    assert torch.equal(decode((16, 16), every, ONE, BY_TENSOR).nan_to_num(7, 8, 9), wide.nan_to_num(7, 8, 9))
    finite = torch.where(torch.isfinite(wide), every.view(torch.uint8), torch.zeros((), dtype=torch.uint8)).view(dtype)
    assert same_bytes(decode((16, 16), finite, ONE, BY_TENSOR), finite.float())


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_a_single_e4m3_that_is_no_number_stays_none(byte: int) -> None:
    codes = torch.zeros(8, 8, dtype=torch.uint8)
    codes[3, 5] = byte
    found = decode((8, 8), codes.view(torch.float8_e4m3fn), ONE, BY_TENSOR)
    assert found.isnan().nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize("dtype", ORDERED)
def test_the_largest_of_a_row_is_told_without_decoding_it(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (2, 40, 70), generator=generator, dtype=torch.uint8)
    codes = torch.where(torch.isfinite(codes.view(dtype).float()), codes, torch.zeros((), dtype=torch.uint8))
    codes[1, 3], codes[0, 5, 1:] = 0, 0
    scale = torch.exp(torch.randn(2, 40, 3, generator=generator))
    decoding = Decoding("float8", 1, 32)
    weight = torch.empty(2, 40, 70)
    decode_into(weight, codes.view(dtype), scale, decoding, phase=(0, 20))
    found = row_amax(codes.view(dtype), scale, decoding, phase=20, scratch=torch.empty(1400))
    assert same_bytes(found, weight.abs().amax(-1, keepdim=True))
    codes[1, 7, 11] = 0xFF
    found = row_amax(codes.view(dtype), scale, decoding, phase=20)
    assert found.isfinite().logical_not().nonzero().tolist() == [[1, 7, 0]]


def test_bytes_of_a_scale_are_exponents() -> None:
    scale = torch.tensor([[0, 1, 127, 254]], dtype=torch.uint8)
    wide = scale_cells(scale, Decoding("float8", 1, 32))
    assert wide.tolist() == [[2.0**-127, 2.0**-126, 1.0, 2.0**127]]
    assert same_bytes(wide, scale_cells(scale.view(torch.float8_e8m0fnu), Decoding("float8", 1, 32)))


BAD = [
    (torch.tensor([[1.0, -0.5]]), "a scale is -0.5, at [0, 1]"),
    (torch.tensor([[1.0], [0.0]]), "a scale is 0, at [1, 0]"),
    (torch.tensor([[float("nan")]]), "a scale is nan, at [0, 0]"),
    (torch.tensor([[float("inf")]], dtype=torch.bfloat16), "a scale is inf, at [0, 0]"),
    (torch.tensor([[3, 255]], dtype=torch.uint8), "a scale is nan, at [0, 1]"),
    (torch.tensor([[1.0, -1.0]]).to(torch.float8_e4m3fn), "a scale is -1, at [0, 1]"),
]


@pytest.mark.parametrize(("scale", "text"), BAD)
def test_a_scale_that_is_none_is_told(scale: torch.Tensor, text: str) -> None:
    assert bad_scale(scale) == text


def test_good_scales_are_good() -> None:
    assert bad_scale(torch.tensor([[1.0, 2.0**-140]])) is None
    assert bad_scale(torch.arange(255, dtype=torch.uint8)) is None
    assert bad_scale(torch.zeros(2, 2).to(torch.float8_e4m3fn)) is None
    assert bad_scale(torch.empty(0, 2)) is None


def test_packed_numbers_are_written_wherever_there_is_room() -> None:
    codes = torch.tensor([[0x21, 0xF7]], dtype=torch.uint8)
    scratch, decoding = torch.zeros(9), Decoding("e2m1", 1, None)
    for start in (0, 1):
        decode_into(scratch[start : start + 4].view(1, 4), codes, ONE, decoding)
        assert scratch[start : start + 4].tolist() == [0.5, 1.0, 6.0, -6.0]
    strided = torch.zeros(4, 2)
    decode_into(strided[:, :1].mT, codes, ONE, decoding)
    assert strided.tolist() == [[0.5, 0.0], [1.0, 0.0], [6.0, 0.0], [-6.0, 0.0]]
    decode_into(scratch[:2].view(1, 2), codes, ONE, decoding, head=1)
    assert scratch[:2].tolist() == [1.0, 6.0]


@pytest.mark.parametrize("exponent", [-140, 99, 100, 119])
def test_the_largest_and_the_least_scales_are_multiplied_exactly(exponent: int) -> None:
    codes = torch.tensor([[0x01, 0x38, 0x7E]], dtype=torch.uint8).view(torch.float8_e4m3fn)  # 2**-9, 1, 448
    found = decode((1, 3), codes, torch.full((1, 1), 2.0**exponent), BY_TENSOR)
    assert same_bytes(found, torch.tensor([[2.0 ** (exponent - 9), 2.0**exponent, 448 * 2.0**exponent]]))


def test_nothing_is_decoded_to_nothing() -> None:
    codes = torch.empty(0, 8, dtype=torch.float8_e4m3fn)
    assert decode((0, 8), codes, torch.empty(0, 1), Decoding("float8", 1, None)).shape == (0, 8)
