"""Matrices in NVFP4 that an engine joins have one global scale in the end, and the weights that they had."""

from __future__ import annotations

import pytest
import torch

from octavo.adapters.engine.global_scales import Joined
from octavo.numerics import nvfp4, schemes


def quantized(largest: list[float], ordinary: float | None = None) -> Joined:
    """Matrices with such largest weights, one below the other.

    Args:
        ordinary: the deviation of all other weights; default: as high as leaves the largest one the largest.
    """
    rows, found = [32, 16, 48][: len(largest)], []
    for seed, (height, most) in enumerate(zip(rows, largest, strict=True)):
        weight = torch.randn(height, 64, generator=torch.Generator().manual_seed(seed))
        weight *= most / weight.abs().max() * 0.99 if ordinary is None else ordinary
        weight[0, 0] = most
        stored, scale = schemes.quantize(weight, "nvfp4")
        found.append((*nvfp4.Packed.of(stored), (1 / scale).view(1)))
    return Joined(*(torch.cat(each) for each in zip(*found, strict=True)), rows)


def weights(joined: Joined) -> torch.Tensor:
    """In float64, which holds them all."""
    by = joined.divisors.repeat_interleave(torch.tensor(joined.rows)).unsqueeze(1)
    return nvfp4.widen(nvfp4.Packed(joined.codes, joined.scales)).double() / by


@pytest.mark.parametrize(
    ("largest", "ordinary"),
    [([8.0, 1.0], None), ([1.0, 40.0, 2.0], None), ([0.08, 20.0], 0.02), ([0.006, 1.0], None)],
)
def test_joined_matrices_get_one_global_scale_and_keep_their_weights(largest, ordinary):
    joined = quantized(largest, ordinary)
    before = weights(joined)
    assert len(joined.divisors.unique()) > 1
    assert joined.misfit() is None
    assert joined.agree()
    assert len(joined.divisors.unique()) == 1
    assert torch.equal(weights(joined), before)


@pytest.mark.parametrize(("largest", "ordinary"), [([0.08, 120.0], 0.02), ([0.08, 2000.0], 0.02), ([1e-6, 1.0], None)])
def test_matrices_that_would_be_rounded_or_become_zero_are_refused(largest, ordinary):
    joined = quantized(largest, ordinary)
    assert "e4m3 rounds some or makes them 0" in str(joined.misfit())


def test_a_global_scale_that_is_no_power_of_two_is_refused_where_it_rounds():
    joined = quantized([1.0, 2.0])
    joined.divisors[1] *= 0.9
    assert joined.misfit() is not None


@pytest.mark.parametrize("divisor", [0.0, -256.0, float("nan"), float("inf")])
def test_a_global_scale_that_is_none_is_refused(divisor):
    joined = quantized([1.0, 2.0])
    joined.divisors[1] = divisor
    assert joined.misfit() == "has a global scale that is no positive number"


def test_zeros_are_joined_with_anything():
    joined = quantized([0.0, 2000.0], 0.0)
    joined.scales[0, 0] = 448
    before = weights(joined)
    assert joined.misfit() is None
    assert joined.agree()
    assert torch.equal(weights(joined), before)
    assert before.abs().max() > 1000


def test_experts_agree_each_for_itself():
    first, second = quantized([8.0, 1.0]), quantized([1.0, 2.0])
    stacked = (torch.stack([one, other]) for one, other in zip(first[:3], second[:3], strict=True))
    joined = Joined(*stacked, first.rows)
    untouched = joined.scales[1].clone()
    assert joined.misfit() is None
    assert joined.agree()
    assert joined.divisors[0].tolist() == [16.0, 16.0]
    assert joined.divisors[1].tolist() == [256.0, 256.0]
    assert torch.equal(joined.scales[1].view(torch.uint8), untouched.view(torch.uint8))


def test_matrices_that_agree_are_left_alone():
    joined = quantized([1.0, 3.0, 6.0])
    before = joined.scales.clone()
    assert not joined.agree()
    assert torch.equal(joined.scales.view(torch.uint8), before.view(torch.uint8))
