"""NVFP4: against a naive definition, and whatever box of a matrix is quantized at once."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import DTYPES, random_weights, reference_nvfp4, same_bytes
from helpers.properties import examples
from octavo import numerics
from octavo.numerics import compiling, constants, nvfp4, schemes
from octavo.numerics.nvfp4 import Packed


def quantized(weight: Tensor, *, search: bool = True) -> tuple[Packed, Tensor]:
    scale = nvfp4.global_scale(weight.float().abs().amax((-2, -1), keepdim=True))
    stored = torch.empty((*weight.shape[:-1], nvfp4.stored_columns(weight.shape[-1])), dtype=torch.uint8)
    nvfp4.quantize_into(Packed.of(stored), weight, scale, search=search)
    return Packed.of(stored), scale


def spread(weight: Tensor) -> Tensor:
    """Groups of very different magnitudes: scales of all kinds occur."""
    factors = torch.exp2(-torch.arange(weight.shape[-1] // 16).repeat_interleave(16).float() * 2.5)
    return (weight.float() * factors).to(weight.dtype)


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1.0, 6.7, 2000.0, 1e-4])
def test_quantizing_equals_the_naive_definition(size: float, dtype: torch.dtype, search: bool) -> None:
    weight = spread(random_weights((3, 128), dtype, 0) * (size / 4))
    weight[1, 16:32] = 0
    weight[1, 40] = -0.0
    found, scale = quantized(weight, search=search)
    codes, scales, whole = reference_nvfp4.quantize(weight, search=search)
    assert scale.item() == whole
    assert same_bytes(found.scales.view(torch.uint8).contiguous(), scales)
    assert same_bytes(found.codes.contiguous(), codes)


def test_ties_go_to_even_codes() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight = torch.cat([ties, -ties, torch.tensor([6.0, 0.0])]).view(1, 16)
    found, scale = quantized(weight, search=False)
    assert scale.item() * found.scales.float().item() == 1
    numbers = [0, 1, 1, 2, 2, 4, 4]
    assert (nvfp4.widen(found) * scale).tolist() == [[*numbers, *(-n for n in numbers), 6, 0]]
    assert found.codes[0, 3].item() == 6 | 8 << 4  # -0.25 is a negative zero; the first of two is in the lower half


def test_the_smallest_scale_has_6_for_what_is_larger() -> None:
    weight = torch.zeros(1, 32)
    weight[0, 0] = 1  # the matrix's amax, so that its scale is 2**-8
    weight[0, 16:] = 2.0**-17 * torch.linspace(-8.9, 8.9, 16)
    found, scale = quantized(weight, search=False)
    codes, scales, _ = reference_nvfp4.quantize(weight, search=False)
    assert found.scales.view(torch.uint8)[0, 1].item() == scales[0, 1].item() == 1
    assert same_bytes(found.codes.contiguous(), codes)
    assert nvfp4.widen(found)[0, -1].item() * scale.item() == 6 * 2.0**-17


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("largest", [torch.finfo(torch.float32).max, 3.3895e38, 2.8e38, 1.5e38, 1.4e38])
def test_finite_weights_stay_finite(largest: float, search: bool) -> None:
    weight = torch.linspace(-1, 1, 64).view(1, 64) * largest
    found, scale = quantized(weight, search=search)
    codes, scales, _ = reference_nvfp4.quantize(weight, search=search)
    assert same_bytes(found.codes.contiguous(), codes)
    assert same_bytes(found.scales.view(torch.uint8).contiguous(), scales)
    back = nvfp4.widen(found).mul_(scale)
    assert back.isfinite().all()
    assert (back - weight).abs().max() <= largest / 4


@pytest.mark.parametrize(
    ("amax", "power"), [(0.0, -8), (6.75, -8), (6.7501, -4), (108.0, -4), (108.1, 0), (0.0066, -8), (0.00659, -9)]
)
def test_global_scales_are_few(amax: float, power: int) -> None:
    assert nvfp4.global_scale(torch.tensor([amax])).item() == 2.0**power


@examples(200)
@given(st.floats(0, float(torch.finfo(torch.float32).max), width=32))
def test_scales_of_any_amax_are_those_that_e4m3_holds(amax: float) -> None:
    scale = nvfp4.global_scale(torch.tensor(amax))
    assert scale.item() == float(reference_nvfp4.global_scale(amax))
    assert amax / scale.item() <= 6 * 288  # so that five numbers of e4m3 further on is 448 at most


def test_weights_that_are_not_finite_have_no_global_scale() -> None:
    assert not torch.isfinite(nvfp4.global_scale(torch.tensor([torch.inf, torch.nan]))).any()


def test_a_search_is_closer_than_the_first_scale_and_than_four_over_six() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    errors = [schemes.error_db(weight, nvfp4.widen(q) * s) for q, s in (quantized(weight, search=s) for s in (0, 1))]
    # round-to-nearest gives 20.4, and the better of 4 and 6 for the largest weight 21.2
    assert errors[0] == pytest.approx(20.4, abs=0.1)
    assert errors[1] == pytest.approx(21.46, abs=0.1)


def test_what_is_quantized_is_exact_in_bf16_and_stays_what_it_is() -> None:
    found, scale = quantized(random_weights((40, 64), torch.bfloat16, 3))
    wide = nvfp4.widen(found) * scale
    assert torch.equal(wide.bfloat16().float(), wide)
    again, scale = quantized(wide)
    assert torch.equal(nvfp4.widen(again) * scale, wide)


@examples(40)
@given(
    lead=st.sampled_from([(), (1,), (3,)]),
    rows=st.integers(1, 6),
    groups=st.integers(1, 5),
    flipped=st.booleans(),
    scratch=st.sampled_from([None, 1, 160, 500, 4000]),
    data=st.data(),
)
def test_any_box_is_that_part_of_the_whole(
    lead: tuple[int, ...], rows: int, groups: int, flipped: bool, scratch: int | None, data: st.DataObject
) -> None:
    weight = random_weights((*lead, rows, groups * 16), torch.bfloat16, rows)
    whole, scale = quantized(weight)
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, groups - 1))
    off = (*[0] * len(lead), row, col * 16)
    size = (*lead, data.draw(st.integers(1, rows - row)), data.draw(st.integers(1, groups - col)) * 16)
    found, _ = quantized(torch.zeros_like(weight))
    weight = weight.mT.contiguous().mT if flipped else weight
    part = weight[..., row : row + size[-2], off[-1] : off[-1] + size[-1]]
    memory = None if scratch is None else torch.empty(scratch)
    nvfp4.quantize_into(found.box(off, size), part, scale, scratch=memory)
    for mine, wanted in zip(found.box(off, size), whole.box(off, size), strict=True):
        assert same_bytes(mine.contiguous(), wanted.contiguous())


@pytest.mark.parametrize("parts", [None, (3, 4)])
def test_a_scheme_like_any_other(parts: tuple[int, ...] | None) -> None:
    weight = random_weights((2, 7, 48), torch.bfloat16, 0)
    weight[:, 3:] *= 30
    q, scale = schemes.quantize(weight, "nvfp4", parts)
    assert (q.dtype, tuple(q.shape), scale.dtype) == (torch.uint8, (2, 7, 27), torch.float32)
    values = schemes.dequantize(q, scale, "nvfp4", parts)
    start = 0
    for number, part in enumerate(parts or (7,)):
        found, mine = quantized(weight[:, start : start + part])
        assert torch.equal(scale.view(2, -1)[:, number], mine.view(2))
        assert torch.equal(values[:, start : start + part], nvfp4.widen(found) * mine)
        start += part


@pytest.mark.parametrize(
    ("table", "of"), [(nvfp4._errors, ()), (nvfp4._pair_codes, ()), (constants.pairs, (nvfp4.VALUES,))]
)
def test_tables_are_the_same_whatever_device_and_dtype_are_the_default(table, of) -> None:
    device = torch.device("cpu")
    table.cache_clear()
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads
    try:
        with torch.device("meta"):  # as transformers does
            made = table(*of, device)
    finally:
        torch.set_default_dtype(torch.float32)
    table.cache_clear()
    assert torch.equal(made, table(*of, device))


@pytest.mark.parametrize("compiles", [True, False])
def test_where_triton_does_not_compile_there_is_one_warning(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def quantize_into(codes: Tensor, scales: Tensor, weight: Tensor, *_: Any, search: bool) -> None:
        tried.append((codes.shape, scales.shape, weight.shape))
        if not compiles:
            raise RuntimeError("fatal error: Python.h: No such file or directory\ncompilation terminated")

    kernel = types.SimpleNamespace(quantize_into=quantize_into)
    monkeypatch.setattr(numerics, "nvfp4_kernel", kernel, raising=False)
    monkeypatch.setattr(compiling, "HAS_TRITON", True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    nvfp4._kernel.cache_clear()
    try:
        if compiles:
            assert nvfp4._kernel(torch.device("cpu")) is kernel
        else:
            with pytest.warns(UserWarning, match=r"RuntimeError: fatal error: Python.h: No such .* same bytes"):
                assert nvfp4._kernel(torch.device("cpu")) is None
        assert nvfp4._kernel(torch.device("cpu")) is (kernel if compiles else None)  # and no second warning
    finally:
        nvfp4._kernel.cache_clear()
    assert tried == [((1, 8), (1, 1), (1, 16))]
