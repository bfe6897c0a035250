"""The numeric definition: against a naive one, against numbers worked out by hand, and on its own terms."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from helpers import DTYPES, SCHEMES, random_weights, reference, same_bytes
from octavo.errors import RecipeError
from octavo.numerics import schemes

SHAPES = ((1, 1), (3, 5), (128, 128), (129, 127), (130, 300), (257, 33))


def all_positive_bf16() -> torch.Tensor:
    """Every finite positive bf16 number, subnormals included, as float32."""
    return torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).float()


# -- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "bits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_equals_the_naive_definition(scheme, dtype, kind):
    for seed, shape in enumerate(SHAPES):
        weight = random_weights(shape, dtype, seed, kind)
        q, scale = schemes.quantize(weight, scheme)
        expected_q, expected_scale = reference.quantize(weight, scheme)
        assert same_bytes(q, expected_q), shape
        assert torch.equal(scale.float().reshape(expected_scale.shape), expected_scale), shape


@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_a_parameter_is_quantized_as_its_values_are(scheme):
    weight = torch.nn.Parameter(random_weights((8, 32), torch.float32, 0))
    for found, wanted in zip(schemes.quantize(weight, scheme), schemes.quantize(weight.data, scheme), strict=True):
        assert same_bytes(found, wanted)
        assert not found.requires_grad


@pytest.mark.parametrize(
    ("scheme", "shape"),
    [
        ("nvfp4", (3, 15)),
        ("nvfp4", (3, 17)),
        *((name, s) for name in schemes.SCHEMES for s in ((16,), (0, 16), (3, 0))),
    ],
)
def test_what_a_scheme_cant_take_is_said(scheme, shape):
    with pytest.raises(RecipeError, match=re.escape(f"a tensor {list(shape)} can't be quantized")):
        schemes.quantize(torch.ones(shape), scheme)


def test_a_channel_worked_out_by_hand():
    # 1 / 448 = 146.29 / 65536, and bf16 holds 147 / 65536; then 1 / scale = 445.8 and 0.5 / scale = 222.9
    q, scale = schemes.quantize(torch.tensor([[-1.0, 0.5, 0.0]]), "fp8_channel")
    assert scale.tolist() == [[147 / 65536]]
    assert q.float().tolist() == [[-448.0, 224.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [3, 512, 1023, 1024, 1025, 2880])
@pytest.mark.parametrize("lead", [(), (2,)], ids=["matrix", "stack"])
def test_rows_are_reduced_as_on_a_gpu_to_the_same_amax(lead, cols, dtype):
    rows = random_weights((*lead, 5, cols), dtype, 0)
    rows[..., 3, -1] = math.nan
    rows[..., 4, cols // 2] = -math.inf
    columns = rows.mT.contiguous().mT  # the same, its columns stored one after another
    wanted = rows.float().abs().amax(-1, keepdim=True)
    every_other = rows.mT.repeat_interleave(2, -1)[..., ::2].mT  # gate without up
    for weight in (rows, columns, every_other):
        out = torch.empty_like(wanted)
        for found in (schemes.row_amax(weight), schemes.row_amax(weight, out), out):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_int8_worked_out_by_hand():
    # 1 / 127 = 129.007 / 16384, and bf16 holds 130 / 16384; then 1 / scale = 126.03 and 0.5 / scale = 63.02
    q, scale = schemes.quantize(torch.tensor([[-1.0, 0.5, 0.0]]), "int8_channel")
    assert scale.tolist() == [[130 / 16384]]
    assert (q.dtype, q.tolist()) == (torch.int8, [[-126, 63, 0]])


def test_int8_ties_round_to_even():
    q, scale = schemes.quantize(torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.5, -126.5]]), "int8_channel")
    assert scale.tolist() == [[1.0]]
    assert q.tolist() == [[127, 0, 2, -2, 126, -126]]


@pytest.mark.parametrize("elements", [None, 1, 90, 91, 200, 1 << 20])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_integers_are_the_same_whatever_memory_a_gpu_has_for_them(lead, elements):
    weight = random_weights((*lead, 7, 45), torch.bfloat16, 0)
    q, scale = schemes.quantize(weight, "int8_channel")
    out = torch.empty_like(q)
    scratch = None if elements is None else torch.empty(elements)
    schemes.divide_into(out, weight, scale, schemes.get("int8_channel"), scratch=scratch)
    assert torch.equal(out, q)
    schemes.divide_into(out[..., :0, :], weight[..., :0, :], scale[..., :0, :], schemes.get("int8_channel"))


def test_ties_round_to_even():
    q, scale = schemes.quantize(torch.tensor([[448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10]]), "fp8_channel")
    assert scale.tolist() == [[1.0]]
    assert q.float().tolist() == [[448.0, 16.0, 20.0, 0.0, 2 * 2.0**-9]]


@pytest.mark.parametrize(
    ("amax", "scale"),
    [(1.0, 2.0**-8), (1.75, 2.0**-8), (1.76, 2.0**-7), (448.0, 1.0), (448.0001, 2.0), (512.0, 2.0), (0.0, 1.0)],
)
def test_mx_scales_are_powers_of_two_rounded_up(amax, scale):
    _, found = schemes.quantize(torch.tensor([[amax, 0.0]]), "mxfp8")
    assert found.dtype == torch.float8_e8m0fnu
    assert found.float().tolist() == [[scale]]


def test_nothing_saturates_in_mx():
    q, scale = schemes.quantize(torch.tensor([[511.0, -470.0, 448.0, 1.0]]), "mxfp8")
    assert scale.item() == 2.0
    assert (2 * q.float()).tolist() == [[512.0, -480.0, 448.0, 1.0]]


def test_mx_scales_of_tiny_weights_stop_at_the_smallest_e8m0():
    q, scale = schemes.quantize(torch.tensor([[2.0**-140, 2.0**-130]]), "mxfp8")
    assert scale.float().tolist() == [[2.0**-127]]
    assert q.float().tolist() == [[0.0, 2.0**-3]]


def test_every_bf16_amax_gets_the_smallest_bf16_scale_that_does_not_saturate():
    amax = all_positive_bf16()
    scale = schemes.scale_from_amax(amax, schemes.get("fp8_channel"))
    expected = torch.tensor([reference.bf16_scale(a) for a in amax.tolist()], dtype=torch.float32)
    assert torch.equal(scale, expected)
    assert torch.equal(scale.bfloat16().float(), scale)
    assert bool((amax / scale <= 448).all())


def test_every_bf16_amax_gets_its_e8m0_scale():
    amax = all_positive_bf16()
    scale = schemes.scale_from_amax(amax, schemes.get("mxfp8"))
    expected = torch.tensor([reference.mx_scale(a) for a in amax.tolist()], dtype=torch.float32)
    assert torch.equal(scale, expected)
    assert torch.equal(schemes.to_stored(scale, schemes.get("mxfp8")).float(), scale)


def test_scales_of_float32_amax_are_rounded_up_not_to_nearest():
    amax = torch.tensor([448.0, math.nextafter(448.0, 449.0), 449.0], dtype=torch.float64).float()
    amax[1] = torch.nextafter(torch.tensor(448.0), torch.tensor(449.0))
    scale = schemes.scale_from_amax(amax, schemes.get("fp8_channel"))
    assert scale.tolist() == [1.0, 1 + 2.0**-7, 1 + 2.0**-7]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_where_all_is_zero_the_scale_is_one(scheme):
    q, scale = schemes.quantize(torch.zeros(130, 140, dtype=torch.bfloat16), scheme)
    assert bool((scale.float() == 1).all())
    assert bool((q.float() == 0).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_float32_weight_too_small_for_a_scale_becomes_zero(scheme):
    weight = torch.full((2, 3), 2.0**-149)
    q, scale = schemes.quantize(weight, scheme)
    assert bool((q.float() == 0).all())
    assert bool((scale.float() > 0).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_amax_of_a_non_finite_weight_is_not_finite(scheme, value, dtype):
    weight = torch.ones(130, 140, dtype=dtype)
    weight[129, 139] = value
    amax = schemes.group_amax(weight, schemes.get(scheme))
    bad = ~torch.isfinite(amax)
    assert int(bad.sum()) == 1
    assert bool(bad[-1, -1])


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [(scheme, bits) for scheme in SCHEMES for bits in (0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFF0000)]
    + [("mxfp8", 0x7FFFFFFF), pytest.param("fp8_channel", 0x7FFFFFFF)],
)
def test_the_scale_of_a_non_finite_amax_is_not_finite(scheme, bits):
    """Where weights are on an accelerator, finite scales are taken for finite weights; its NaN is 0x7FFFFFFF."""
    amax = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    assert not torch.isfinite(schemes.scale_from_amax(amax, schemes.get(scheme))).any()


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "shape", "parts", "expected"),
    [
        ("fp8_channel", (300, 200), None, (300, 1)),
        ("fp8_channel", (7, 300, 200), (100, 200), (7, 300, 1)),
        ("fp8_block", (300, 200), None, (3, 2)),
        ("fp8_block", (300, 200), (150, 150), (4, 2)),
        ("fp8_block", (7, 300, 200), (150, 150), (7, 4, 2)),
        ("fp8_tensor", (300, 200), None, ()),
        ("fp8_tensor", (300, 200), (300,), ()),
        ("fp8_tensor", (300, 200), (100, 200), (2, 1)),
        ("fp8_tensor", (7, 300, 200), None, (7, 1, 1)),
        ("mxfp8", (300, 200), (100, 200), (300, 7)),
        ("mxfp8", (7, 300, 200), None, (7, 300, 7)),
        ("int8_channel", (7, 300, 200), (100, 200), (7, 300, 1)),
    ],
)
def test_scales_have_the_promised_shape(scheme, shape, parts, expected):
    assert schemes.get(scheme).scale_shape(shape, parts) == expected
    _, scale = schemes.quantize(torch.ones(shape), scheme, parts)
    assert scale.shape == expected
    assert scale.dtype == schemes.get(scheme).scale_dtype


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_expert_of_a_stack_is_quantized_as_if_alone(scheme):
    stack = (
        random_weights((3, 130, 150), torch.bfloat16, 1) * torch.tensor([1.0, 100.0, 1e-4]).bfloat16()[:, None, None]
    )
    q, scale = schemes.quantize(stack, scheme)
    for expert in range(3):
        alone_q, alone_scale = schemes.quantize(stack[expert], scheme)
        assert same_bytes(q[expert], alone_q)
        assert torch.equal(scale[expert].float(), alone_scale.float().reshape(scale[expert].shape))


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_parts_never_share_a_scale_group(scheme, lead):
    parts = (100, 30, 140)
    pieces = [random_weights((*lead, n, 150), torch.bfloat16, n) * 10.0**i for i, n in enumerate(parts)]
    q, scale = schemes.quantize(torch.cat(pieces, -2), scheme, parts)
    alone = [schemes.quantize(piece, scheme) for piece in pieces]
    assert torch.equal(q.float(), torch.cat([a.float() for a, _ in alone], -2))
    grids = [s.float().reshape(*lead, -1, scale.shape[-1]) for _, s in alone]
    assert torch.equal(scale.float(), torch.cat(grids, -2))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_transposed_view_gives_the_same_bytes_as_its_copy(scheme):
    weight = random_weights((2, 150, 130), torch.bfloat16, 2).transpose(-1, -2)
    for mine, theirs in zip(
        schemes.quantize(weight, scheme), schemes.quantize(weight.contiguous(), scheme), strict=True
    ):
        assert same_bytes(mine, theirs)


def test_quantizing_leaves_the_weight_alone():
    weight = random_weights((130, 150), torch.float32, 3)
    before = weight.clone()
    schemes.quantize(weight, "fp8_block")
    assert torch.equal(weight, before)


@pytest.mark.parametrize("scratch", [False, True])
@pytest.mark.parametrize("box", [(0, 130, 0, 150), (5, 100, 7, 31), (127, 129, 31, 33), (64, 300, 128, 129)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_box_with_its_phase_gives_the_bytes_of_the_whole(scheme, box, scratch):
    """Any box, given the scales of the groups that it touches, becomes what the whole tensor has there."""
    found = schemes.get(scheme)
    weight = random_weights((2, 300, 150), torch.bfloat16, 4)
    q, scale = schemes.quantize(weight, scheme)
    grid = scale.float().reshape(2, *found.cells(300, 150))
    top, bottom, left, right = box
    rows, cols = found.group_rows or 1 << 30, found.group_cols or 1 << 30
    cells = grid[:, top // rows : (bottom - 1) // rows + 1, left // cols : (right - 1) // cols + 1]
    out = torch.empty(2, bottom - top, right - left, dtype=found.dtype)
    part = weight[:, top:bottom, left:right]
    phase = (top % rows, left % cols)
    memory = torch.empty(part.numel() + 5) if scratch else None
    schemes.quantize_into(out, part, cells, found, phase=phase, scratch=memory)
    assert same_bytes(out, q[:, top:bottom, left:right])


@pytest.mark.parametrize("kind", ["normal", "bits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dividing_as_on_a_gpu_gives_the_same_bytes(scheme, dtype, kind):
    found = schemes.get(scheme)
    rows, cols = found.group_rows or 1 << 30, found.group_cols or 1 << 30
    for transposed in (False, True):
        weight = random_weights((2, 300, 150), dtype, 7, kind)
        q, scale = schemes.quantize(weight, scheme)
        grid = scale.float().reshape(2, *found.cells(300, 150))
        part = (weight.mT.contiguous().mT if transposed else weight)[:, 10:, 3:]
        out = torch.empty(part.shape, dtype=found.dtype)
        phase = (10 % rows, 3 % cols)
        schemes.divide_into(out, part, grid[:, 10 // rows :], found, phase=phase)
        assert same_bytes(out, q[:, 10:, 3:])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_amax_of_boxes_makes_up_the_amax_of_the_whole(scheme):
    found = schemes.get(scheme)
    weight = random_weights((300, 150), torch.float16, 5)
    whole = schemes.group_amax(weight, found)
    rows, cols = found.group_rows or 1 << 30, found.group_cols or 1 << 30
    merged = torch.zeros_like(whole)
    for top, bottom in ((0, 77), (77, 200), (200, 300)):
        for left, right in ((0, 10), (10, 129), (129, 150)):
            scratch = torch.empty(300 * 150, dtype=weight.dtype)
            part = schemes.group_amax(
                weight[top:bottom, left:right], found, phase=(top % rows, left % cols), scratch=scratch
            )
            region = merged[top // rows : (bottom - 1) // rows + 1, left // cols : (right - 1) // cols + 1]
            region.copy_(torch.maximum(region, part))
    assert torch.equal(merged, whole)


# -- the way back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [None, (100, 200)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dequantizing_multiplies_each_element_with_the_scale_of_its_group(scheme, parts):
    weight = random_weights((2, 300, 150), torch.bfloat16, 6)
    q, scale = schemes.quantize(weight, scheme, parts)
    back = schemes.dequantize(q, scale, scheme, parts)
    group_rows, group_cols = schemes.get(scheme).group_rows, schemes.get(scheme).group_cols
    row_cells, cell, start = [], 0, 0
    for part in parts or (300,):
        row_cells += [cell + i // (group_rows or part) for i in range(part)]
        cell, start = row_cells[-1] + 1, start + part
    col_cells = [i // (group_cols or 150) for i in range(150)]
    expected = q.float() * scale.float()[:, row_cells][:, :, col_cells]
    assert torch.equal(back, expected)
    assert torch.equal(schemes.dequantize(q, scale, scheme, parts, torch.bfloat16), expected.bfloat16())


def test_dequantizing_takes_the_lone_scale_of_a_matrix():
    q, scale = schemes.quantize(torch.tensor([[448.0, 1.0]]), "fp8_tensor")
    assert scale.shape == ()
    assert schemes.dequantize(q, scale * 2, "fp8_tensor").tolist() == [[896.0, 2.0]]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_error_of_gaussian_weights_is_about_31_db_in_fp8_and_42_in_int8(scheme):
    weight = random_weights((512, 512), torch.bfloat16, 7)
    error = schemes.error_db(weight, schemes.dequantize(*schemes.quantize(weight, scheme), scheme))
    least = 41 if scheme == "int8_channel" else 30
    assert least < error < least + 3


def test_error_db_of_known_cases():
    ones = torch.ones(10)
    assert schemes.error_db(ones, ones) == math.inf
    assert schemes.error_db(torch.zeros(3), torch.ones(3)) == -math.inf
    assert schemes.error_db(ones, ones * 0.9) == pytest.approx(20, abs=1e-5)


# -- names ------------------------------------------------------------------------------------------------------------


def test_an_unknown_scheme_is_an_error_that_lists_the_known():
    with pytest.raises(RecipeError, match="unknown scheme 'fp4'; known: fp8_channel, fp8_block, fp8_tensor, mxfp8"):
        schemes.get("fp4")


def test_a_scheme_stands_for_itself():
    assert schemes.get(schemes.get("mxfp8")) is schemes.get("mxfp8")


def test_the_reference_rounds_as_torch_does():
    """Guards the reference itself: its rounding against torch's over all bf16 numbers within ±448."""
    values = all_positive_bf16()
    values = torch.cat([values, -values])
    values = values[values.abs() <= 448]
    assert same_bytes(reference.e4m3(values.numpy().astype(np.float32)), values.to(torch.float8_e4m3fn))
