"""NVFP4 without a search against compressed-tensors and ModelOpt, given the same global scale: the same bytes.

For compressed-tensors, that is of float32 weights: of others, it rounds a sixth of the amax to their dtype before it
makes a scale of it. Groups that are all 0 have scales of 1/8 there. The global scale of both is amax / 2688; octavo's
is a power of two, so that what is read is exact in bf16.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.numerics import nvfp4
from octavo.numerics.nvfp4 import Packed

pytestmark = pytest.mark.peers


def weights(seed: int, *, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 160, generator=generator) * torch.exp(torch.randn(48, 1, generator=generator))
    return weight.to(dtype)


def quantized(weight: Tensor, *, search: bool) -> tuple[Packed, Tensor]:
    scale = nvfp4.global_scale(weight.float().abs().amax().view(1, 1))
    found = Packed.of(torch.empty(weight.shape[0], nvfp4.stored_columns(weight.shape[1]), dtype=torch.uint8))
    nvfp4.quantize_into(found, weight, scale, search=search)
    return found, scale.view(1)


@pytest.mark.parametrize("seed", range(4))
def test_compressed_tensors_makes_the_same(seed: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4, unpack_fp4_from_uint8
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = weights(seed)
    found, scale = quantized(weight, search=False)
    groups = weight.unflatten(-1, (-1, 16))
    arguments = preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments, global_scale=1 / scale)
    assert torch.equal(scales.float(), found.scales.float())
    assert torch.equal(quantize_and_pack_fp4(weight, scales, 1 / scale), found.codes)
    # and reads what a search has found as octavo does
    best, scale = quantized(weight, search=True)
    numbers = unpack_fp4_from_uint8(best.codes.contiguous(), *weight.shape, dtype=torch.float32)
    values = numbers.unflatten(-1, (-1, 16)) * (best.scales.float() / (1 / scale)).unsqueeze(-1)
    assert torch.equal(values.flatten(-2), nvfp4.widen(best) * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_modelopt_makes_the_same(seed: int, dtype: torch.dtype) -> None:
    qtensor = pytest.importorskip("modelopt.torch.quantization.qtensor")
    weight = weights(seed, dtype=dtype)
    found, scale = quantized(weight, search=False)
    made, scales, _ = qtensor.NVFP4QTensor.quantize(weight, 16, weights_scaling_factor_2=scale.clone())
    assert torch.equal(scales.float(), found.scales.float())
    assert torch.equal(made._quantized_data, found.codes)
