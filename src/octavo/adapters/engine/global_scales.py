"""One global scale for matrices in NVFP4 that an engine joins to one: it takes one for all, whatever the others are.

A matrix has a global scale by its largest weight, nearly always the same one (see `octavo.numerics.nvfp4`). Where those
of q, k and v, or of gate and up, differ, an engine would scale some of them wrongly. So scales of groups are made
smaller by as much as the largest global scale is larger than their own. Both are powers of two, by which e4m3 loses
nothing down to 2**-6. Where it would, its weights have no such form: that is said, and nothing is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...numerics.nvfp4 import E4M3

#: of a byte of two numbers, all but their signs
_MAGNITUDES = 0x77


class Joined(NamedTuple):
    """Matrices of one layer, or of each expert of one, as an engine holds them."""

    codes: Tensor  # uint8 [..., out, in / 2]
    scales: Tensor  # of groups, e4m3 [..., out, in / 16]
    divisors: Tensor  # one by the global scale of each matrix, float32 [..., matrices]
    rows: Sequence[int]  # of each matrix

    @torch.no_grad()
    def misfit(self) -> str | None:
        """Say why no global scale holds for all of them; None where one does."""
        if not bool(((self.divisors > 0) & (self.divisors < math.inf)).all()):
            return "has a global scale that is no positive number"
        for codes, scales, ratio in self._others():
            smaller = scales.float() * ratio
            lossy = smaller.to(E4M3).float() != smaller
            if bool((lossy & _has_weights(codes, scales)).any()):
                return (
                    "joins matrices whose global scales are too far apart: by the largest, which holds for all, scales "
                    f"of groups of another become {float(ratio):.2g} times what they are, and e4m3 rounds some or "
                    "makes them 0"
                )
        return None

    @torch.no_grad()
    def agree(self) -> bool:
        """Bring them to one global scale, in place; False, and nothing is done, where they have one.

        To be called where there is no `misfit`.
        """
        others = list(self._others())
        for _, scales, ratio in others:
            scales.copy_((scales.float() * ratio).to(E4M3))  # that of a group of zeros may become another
        if others:
            self.divisors.copy_(self._least().expand_as(self.divisors))
        return bool(others)

    def _least(self) -> Tensor:
        return self.divisors.amin(-1, keepdim=True)

    def _others(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Codes and scales of each matrix that has not the largest global scale; its own by that."""
        ratios = self._least() / self.divisors
        for *expert, number in (ratios != 1).nonzero().tolist():
            begin, at = sum(self.rows[:number]), tuple(expert)
            codes, scales = (part[at].narrow(0, begin, self.rows[number]) for part in (self.codes, self.scales))
            yield codes, scales, ratios[(*at, number)]


def _has_weights(codes: Tensor, scales: Tensor) -> Tensor:
    """Which groups have a number other than 0."""
    return codes.bitwise_and(_MAGNITUDES).reshape(*scales.shape, -1).amax(-1) != 0
