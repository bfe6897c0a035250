"""Numbers of new weights, looked at on their device."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.adapters.engine.soundness import Soundness
from octavo.errors import WeightError
from octavo.numerics.schemes import FP8


def asked() -> Soundness:
    return Soundness("Its layer is as it was")


def fp8(*bits: int) -> torch.Tensor:
    return torch.tensor([[0x00, 0x7E, 0xFE, *bits]], dtype=torch.uint8).view(FP8)


@pytest.mark.parametrize(
    "weight", [fp8(), torch.tensor([math.inf]), torch.tensor(1.0), torch.empty(0, 4), fp8()[:, :0]]
)
def test_numbers_and_infinities_of_what_stays_are_sound(weight: torch.Tensor) -> None:
    soundness = asked()
    soundness.of_weight("a.weight", weight)
    soundness.check()


@pytest.mark.parametrize("weight", [fp8(0x7F), fp8(0xFF), torch.tensor([1, math.nan]).bfloat16()])
def test_a_weight_that_holds_nan_is_named_once(weight: torch.Tensor) -> None:
    soundness = asked()
    soundness.of_weight("a.weight", torch.ones(2))
    soundness.of_weight("b.weight", weight)
    with pytest.raises(WeightError) as caught:
        soundness.check()
    assert str(caught.value).startswith("b.weight: holds a number that is not finite. Its layer is as it was; send ")
    soundness.check()


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, -math.inf])
def test_a_scale_is_a_finite_number_that_is_not_negative(value: float) -> None:
    soundness = asked()
    soundness.of_scale("a.weight_scale", torch.tensor([[1.0], [0.0]]))
    soundness.check()
    soundness.of_scale("a.weight_scale", torch.tensor([[1.0], [value]]))
    with pytest.raises(WeightError, match=r"a\.weight_scale: holds a number that is not finite, or is negative"):
        soundness.check()


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, math.nan, math.inf])
def test_what_divides_is_a_finite_number_above_0(value: float) -> None:
    soundness = asked()
    soundness.of_divisor("a.weight_global_scale", torch.tensor([256.0]))
    soundness.check()
    soundness.of_divisor("a.weight_global_scale", torch.tensor([value]))
    with pytest.raises(
        WeightError, match=r"a\.weight_global_scale: holds a number that is not finite, or is not above 0"
    ):
        soundness.check()


def test_a_quantized_weight_has_no_infinities() -> None:
    soundness = asked()
    soundness.of_quantized("a.weight", torch.tensor([[math.inf]]))
    soundness.of_quantized("b.weight", torch.tensor([[math.nan]]))
    with pytest.raises(WeightError, match=r"a\.weight \(and 1 more\): holds a number that is not finite\."):
        soundness.check()
