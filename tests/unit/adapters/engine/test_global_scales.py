"""Matrices in NVFP4 that an engine joins have one global scale in the end, and the weights that they had."""

from __future__ import annotations

import pytest
import torch

from octavo.adapters.engine.global_scales import agree
from octavo.numerics import nvfp4, schemes


def quantized(largest: list[float]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Codes, scales and divisors of matrices with such largest weights, one below the other; how many rows each has."""
    rows, found = [32, 16, 48][: len(largest)], []
    for seed, (height, most) in enumerate(zip(rows, largest, strict=True)):
        weight = torch.randn(height, 64, generator=torch.Generator().manual_seed(seed))
        weight[0, 0] = weight.abs().max() * 1.01
        stored, scale = schemes.quantize(weight * most / weight.abs().max(), "nvfp4")
        found.append((*nvfp4.Packed.of(stored), (1 / scale).view(1)))
    codes, scales, divisors = (torch.cat(each) for each in zip(*found, strict=True))
    return codes, scales, divisors, rows


def widened(codes, scales, divisors, rows):
    return nvfp4.widen(nvfp4.Packed(codes, scales)) / divisors.repeat_interleave(torch.tensor(rows)).unsqueeze(1)


@pytest.mark.parametrize("largest", [[8.0, 1.0], [1.0, 40.0, 2.0]])
def test_joined_matrices_get_one_global_scale_and_keep_their_weights(largest):
    codes, scales, divisors, rows = quantized(largest)
    before = widened(codes, scales, divisors, rows)
    assert len(divisors.unique()) > 1
    assert agree(scales, divisors, rows)
    assert len(divisors.unique()) == 1
    # by one divisor for all, as engines do
    after = nvfp4.widen(nvfp4.Packed(codes, scales)) / divisors.max()
    assert torch.allclose(after, before, rtol=2**-4, atol=2**-10 * 6 / float(divisors.max()))


def test_experts_agree_each_for_itself():
    first, second = quantized([8.0, 1.0]), quantized([1.0, 2.0])
    scales, divisors = (torch.stack([first[part], second[part]]) for part in (1, 2))
    untouched = scales[1].clone()
    assert agree(scales, divisors, first[3])
    assert divisors[0].tolist() == [16.0, 16.0]
    assert divisors[1].tolist() == [256.0, 256.0]
    assert torch.equal(scales[1].view(torch.uint8), untouched.view(torch.uint8))


def test_matrices_that_agree_are_left_alone():
    _, scales, divisors, rows = quantized([1.0, 3.0, 6.0])
    before = scales.clone()
    assert not agree(scales, divisors, rows)
    assert torch.equal(scales.view(torch.uint8), before.view(torch.uint8))
