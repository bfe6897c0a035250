"""Weights of four bits stay exact in FP8 wherever any power of two as a scale lets them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import same_bytes
from helpers.quantized import stored
from octavo.checkpoint.codings import Decoding
from octavo.numerics import schemes
from octavo.numerics.decoding import decode
from octavo.numerics.lossless import count_exact, keeps, lossless_scale, unit_of
from octavo.numerics.schemes import Scheme

MXFP4 = Decoding("e2m1", 1, 32, powers=True)
NVFP4 = Decoding("e2m1", 1, 16)
FP8_SCHEMES = ("fp8_channel", "fp8_block", "fp8_tensor", "mxfp8")


def quantized(weight: Tensor, scheme: Scheme, unit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    scale = lossless_scale(schemes.group_amax(weight, scheme), unit)
    q = torch.empty(weight.shape, dtype=scheme.dtype)
    schemes.quantize_into(q, weight, scale, scheme)
    return q, scale


def mxfp4(exponents: Tensor, seed: int) -> Tensor:
    """Any numbers, with these exponents [rows, groups]."""
    codes = torch.randint(0, 256, (exponents.shape[0], exponents.shape[1] * 16), dtype=torch.uint8)
    codes.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return decode((codes.shape[0], codes.shape[1] * 2), codes, exponents.to(torch.uint8), MXFP4)


@given(
    st.sampled_from(FP8_SCHEMES),
    st.lists(st.lists(st.integers(0, 14), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(20, 220),
    st.integers(0, 99),
)
def test_exponents_that_differ_by_fourteen_are_kept_exactly(
    scheme: str, spread: list[list[int]], least: int, seed: int
) -> None:
    weight = mxfp4(torch.tensor(spread) + least, seed)
    q, scale = quantized(weight, schemes.get(scheme))
    assert same_bytes(schemes.dequantize(q, scale, scheme), weight)
    assert count_exact(weight, q, scale, schemes.get(scheme).groups) == weight.numel()


@given(st.lists(st.integers(60, 100), min_size=3, max_size=3), st.integers(0, 99), st.integers(0, 3))
def test_no_other_power_of_two_keeps_more(exponents: list[int], seed: int, zeros: int) -> None:
    scheme = schemes.get("fp8_channel")
    weight = mxfp4(torch.tensor([exponents]), seed)
    weight[:, : zeros * 32] = 0
    q, scale = quantized(weight, scheme)
    kept = count_exact(weight, q, scale, scheme.groups)
    amax = weight.abs().amax(-1, keepdim=True)
    for power in range(-80, 20):
        other = torch.full_like(scale, 2.0**power)
        if (amax / other <= 448).all():
            codes = (weight / other).to(torch.float8_e4m3fn)
            assert count_exact(weight, codes, other, scheme.groups) <= kept


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "fp8_tensor"])
@pytest.mark.parametrize("seed", range(4))
def test_of_nvfp4_all_is_kept_that_four_bits_can_hold(scheme: str, divided: bool, seed: int) -> None:
    decoding = Decoding("e2m1", 1, 16, divided=divided)
    held = stored((8, 64), decoding, torch.float8_e4m3fn, seed, zeros=False)
    unit = unit_of(decoding, held.global_scale)
    assert unit is not None
    weight, terms = held.weight, schemes.get(scheme)
    q, scale = quantized(weight, terms, unit)
    power = schemes.expand_scale(scale / unit, weight.shape, terms).double()
    times = (weight / unit * 1.5).double().mul(1 << 10).round() / (1 << 10)  # v * t, of which 2**-10 is the least
    wanted = times / 1.5 / power
    possible = ((wanted.float().to(torch.float8_e4m3fn).double() - wanted).abs() < 1e-9 * wanted.abs() + 1e-30).sum()
    assert 0.5 * weight.numel() < possible == count_exact(weight, q, scale, terms.groups)


def test_of_nvfp4_less_is_lost_than_under_other_scales() -> None:
    scheme = "fp8_channel"
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (64, 128), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(64, 16, generator=generator) * 384 + 64).to(torch.float8_e4m3fn)
    by = torch.full((1, 1), 0.0137)
    weight = decode((64, 256), codes, scales, NVFP4, global_scale=by)
    q, scale = quantized(weight, schemes.get(scheme), unit_of(NVFP4, by))
    others, plain = schemes.quantize(weight, scheme)
    mine = schemes.error_db(weight, schemes.dequantize(q, scale, scheme))
    assert mine > schemes.error_db(weight, schemes.dequantize(others, plain, scheme)) + 3


@pytest.mark.parametrize("by", [1e-45, 1e-42, 3e-39, 1e-36])
def test_a_global_scale_next_to_nothing_makes_no_scale_too_small(by: float) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (64, 128), dtype=torch.uint8, generator=generator)
    scales = (torch.exp(torch.randn(64, 16, generator=generator)) / 100).to(torch.float8_e4m3fn)
    weight = decode((64, 256), codes, scales, NVFP4, global_scale=torch.full((1, 1), by))
    q, scale = quantized(weight, schemes.get("fp8_channel"), unit_of(NVFP4, torch.full((1, 1), by)))
    found = schemes.dequantize(q, scale, "fp8_channel").double()
    step = scale.double() * 2.0**-9
    assert ((found - weight).abs() <= torch.maximum(weight.double().abs() / 15.99, step / 2) + 2.0**-149).all()


def test_fp8_in_blocks_with_powers_of_two_is_kept_in_rows() -> None:
    decoding = Decoding("float8", 4, 4, powers=True)
    torch.manual_seed(0)
    codes = torch.randn(16, 64).mul(60).to(torch.float8_e4m3fn)
    exponents = torch.randint(118, 122, (4, 16), dtype=torch.uint8)
    weight = decode((16, 64), codes, exponents, decoding)
    scheme = schemes.get("fp8_channel")
    q, scale = quantized(weight, scheme)
    assert count_exact(weight, q, scale, scheme.groups) == weight.numel()
    others, plain = schemes.quantize(weight, "fp8_channel")
    assert count_exact(weight, others, plain, scheme.groups) < weight.numel() / 2


def test_who_has_lossless_scales() -> None:
    channel, mx = schemes.get("fp8_channel"), schemes.get("mxfp8")
    integers = dataclasses.replace(channel, dtype=torch.int8)
    assert keeps(MXFP4, channel)
    assert keeps(MXFP4, mx)
    assert keeps(NVFP4, channel)
    assert not keeps(NVFP4, mx)
    assert keeps(Decoding("float8", 128, 128, powers=True), channel)
    assert not keeps(Decoding("float8", 128, 128), channel)
    assert not keeps(MXFP4, integers)
    assert not keeps(Decoding("int4_in_int32", 1, 32), channel)


def test_a_group_of_zeros_has_the_scale_one() -> None:
    zeros, unit = torch.zeros(2, 1), torch.full((1, 1), 0.3)
    assert lossless_scale(zeros).tolist() == lossless_scale(zeros, unit).tolist() == [[1.0], [1.0]]
