"""Whether new weights are numbers that a model can compute with: asked on their device, looked at a few at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...checkpoint import dtypes
from ...errors import WeightError
from ...numerics.schemes import FP8

#: the bits of FP8's NaN, but for its sign
_NAN = 0x7F
_NOT_FINITE = "holds a number that is not finite"
_NO_SCALE = "holds a number that is not finite, or is negative"
_NO_DIVISOR = "holds a number that is not finite, or is not above 0"


class Soundness:
    """Of tensors that have come and were not looked at yet.

    Args:
        then: what has become of the layer of one that is unsound.
    """

    def __init__(self, then: str) -> None:
        self._then = then
        self._asked: list[tuple[str, Tensor, str]] = []  # tensor, whether it is sound, what it is else

    def of_quantized(self, name: str, scale: Tensor) -> None:
        """A weight, by the scale that was made of it: all of its numbers have to be finite."""
        self._asked.append((name, torch.isfinite(scale).all(), _NOT_FINITE))

    def of_scale(self, name: str, scale: Tensor) -> None:
        """Scales; of codes that have no other form, each is sound."""
        if scale.dtype == FP8:
            scale = scale.float()
        self._asked.append((name, ((scale >= 0) & (scale < math.inf)).all(), _NO_SCALE))

    def of_divisor(self, name: str, divisor: Tensor) -> None:
        """One by a global scale: what a layer is divided by."""
        self._asked.append((name, ((divisor > 0) & (divisor < math.inf)).all(), _NO_DIVISOR))

    def of_weight(self, name: str, weight: Tensor) -> None:
        """One that stays as it is: it may hold infinities."""
        if not weight.numel():
            return
        if weight.dtype in dtypes.QUANTIZABLE:
            self._asked.append((name, ~weight.amax().isnan(), _NOT_FINITE))
        elif weight.dtype == FP8:
            bits = weight.view(torch.uint8).bitwise_and(_NAN)
            self._asked.append((name, bits.amax() != _NAN, _NOT_FINITE))

    def check(self) -> None:
        """Look at what was asked.

        Raises:
            WeightError: naming the first tensor that is unsound.
        """
        asked, self._asked = self._asked, []
        for device in {flag.device for _, flag, _ in asked}:
            mine = [each for each in asked if each[1].device == device]
            flags = torch.stack([flag for _, flag, _ in mine]).tolist()
            bad = [(name, what) for (name, _, what), good in zip(mine, flags, strict=True) if not good]
            if bad:
                more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
                name, what = bad[0]
                raise WeightError(f"{name}{more}: {what}. {self._then}; send that again in another update.")
