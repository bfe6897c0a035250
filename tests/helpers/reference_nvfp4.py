"""NVFP4 once more, group by group in exact fractions, sharing no line with ``octavo.numerics.nvfp4``."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

NUMBERS = [Fraction(value) / 2 for value in (0, 1, 2, 3, 4, 6, 8, 12)]


def scales_of_e4m3() -> list[Fraction]:
    """By their bits, 0 to 448."""
    found = [Fraction(bits, 512) for bits in range(8)]
    found += [Fraction(8 + bits % 8, 8) * Fraction(2) ** (bits // 8 - 7) for bits in range(8, 127)]
    return found


E4M3 = scales_of_e4m3()


def nearest(value: Fraction, numbers: list[Fraction]) -> int:
    """Which number is nearest; of two as near, the one with an even place."""
    return min(range(len(numbers)), key=lambda place: (abs(numbers[place] - value), place % 2))


def global_scale(amax: float) -> Fraction:
    if amax == 0:
        return Fraction(1, 256)
    least = math.frexp(amax)[1] - 12  # 1728 * 2**least is below amax
    while Fraction(amax) > 1728 * Fraction(2) ** least:
        least += 1
    if least < -17:
        return Fraction(2) ** max(least + 9, -115)
    usual = -8
    while usual < least:
        usual += 4
    return Fraction(2) ** usual


def divided(a: Fraction | float, b: Fraction | float) -> Fraction:
    """The quotient, rounded to float32."""
    return Fraction(float(np.float32(float(a)) / np.float32(float(b))))


def best_scale(group: np.ndarray, scale: Fraction, first: int) -> int:
    step = divided(1, E4M3[first] * scale) * 28
    step = Fraction(float(np.float32(float(step))))
    costs = []
    for tried in (first, first + 1, first + 4, first + 5):
        total = 0
        for weight in group:
            part = math.floor(np.float32(abs(weight)) * np.float32(float(step)))
            counted = Fraction(2 * part + 1, 56) * E4M3[first]
            ways = [number * E4M3[tried] for number in NUMBERS]
            distance = min(abs(counted - way) for way in ways) / E4M3[first]
            total += min(math.floor(distance**2 * 1024 + Fraction(1, 2)), 4095)
        costs.append(total)
    return first + (0, 1, 4, 5)[costs.index(min(costs))]


def quantize(weight: Tensor, *, search: bool = True) -> tuple[Tensor, Tensor, float]:
    """weight [out, in] -> codes uint8 [out, in / 2], bits of scales uint8 [out, in / 16], the global scale."""
    wide = weight.float().numpy()
    rows, cols = wide.shape
    scale = global_scale(float(np.abs(wide).max(initial=0)))
    codes, scales = np.zeros((rows, cols), np.uint8), np.zeros((rows, cols // 16), np.uint8)
    for row in range(rows):
        for group in range(cols // 16):
            mine = wide[row, group * 16 : group * 16 + 16]
            amax = divided(float(np.abs(mine).max()), scale)
            bits = nearest(divided(amax, 6), E4M3) if amax else 0x38
            bits = max(bits, 1)
            if search:
                bits = best_scale(mine, scale, bits)
            if scale == 2**120:
                bits = min(bits, E4M3.index(Fraction(40)))
            scales[row, group] = bits
            for place, value in enumerate(mine):
                quotient = divided(abs(float(value)), E4M3[bits] * scale)
                code = nearest(quotient, NUMBERS)
                negative = value < 0 and (code or quotient)
                codes[row, group * 16 + place] = code | (8 if negative else 0)
    return torch.from_numpy(codes[:, 0::2] | codes[:, 1::2] << 4), torch.from_numpy(scales), float(scale)
