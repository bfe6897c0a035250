"""octavo's kernels for processors, in vLLM's layers: which it selects, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.vllm_models import one_rank
from octavo.adapters.vllm import cpu_kernels
from octavo.conversion import packing
from octavo.numerics import schemes

pytestmark = [pytest.mark.peers, pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.usefixtures("vllm_loads")]

ROWS, COLS = 384, 320


@pytest.fixture(scope="module", autouse=True)
def _vllm() -> Iterator[None]:
    cpu_kernels.register()
    with one_rank():
        yield


def kernel(scheme: str) -> Any:
    """The kernel that vLLM selects for a layer of an FP8 checkpoint."""
    from vllm.model_executor.kernels.linear import init_fp8_linear_kernel
    from vllm.model_executor.layers.quantization.utils import quant_utils as keys

    group = keys.GroupShape(128, 128)
    weight, activation = {
        "fp8_channel": (keys.kFp8StaticChannelSym, keys.kFp8DynamicTokenSym),
        "fp8_block": (keys.create_fp8_quant_key(static=True, group_shape=group), keys.kFp8Dynamic128Sym),
    }[scheme]
    dtype = torch.bfloat16
    return init_fp8_linear_kernel(activation, weight, dtype, dtype, (ROWS, COLS))


class Layer(torch.nn.Module):
    """A layer as the kernel finds it after loading."""

    def __init__(self, q: torch.Tensor, scale: torch.Tensor, scheme: str) -> None:
        super().__init__()
        weight = q.t() if scheme == "fp8_channel" else q
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.weight_scale = torch.nn.Parameter(scale, requires_grad=False)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block"])
def test_products_are_those_of_the_dequantized_weight(scheme: str, compiled: bool) -> None:
    if scheme == "fp8_block" and torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM has a kernel of its own")
    torch.manual_seed(0)
    weight, x, bias = torch.randn(ROWS, COLS), torch.randn(2, 3, COLS), torch.randn(ROWS)
    weight, x, bias = (tensor.bfloat16() for tensor in (weight, x, bias))
    q, scale = schemes.quantize(weight, scheme)
    layer, chosen = Layer(q, scale, scheme), kernel(scheme)
    assert type(chosen).__name__ == {"fp8_channel": "OctavoChannelLinear", "fp8_block": "OctavoBlockLinear"}[scheme]
    apply = torch.compile(chosen.apply_weights, fullgraph=True) if compiled else chosen.apply_weights
    with torch.inference_mode():
        made = apply(layer, x, bias)
    wanted = F.linear(x.double(), schemes.dequantize(q, scale, scheme, dtype=torch.float64), bias.double())
    assert made.shape == (2, 3, ROWS)
    assert made.dtype == torch.bfloat16
    assert (made.double() - wanted).norm() / wanted.norm() < 2**-7


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_four_int8_in_a_word_are_multiplied_as_they_are(compiled: bool) -> None:
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.scalar_type import scalar_types

    torch.manual_seed(0)
    weight, x, bias = torch.randn(ROWS, COLS), torch.randn(2, 3, COLS), torch.randn(ROWS)
    weight, x, bias = (tensor.bfloat16() for tensor in (weight, x, bias))
    q, scale = schemes.quantize(weight, "int8_channel")
    about = MPLinearLayerConfig((COLS, ROWS), (COLS, ROWS), scalar_types.uint8b128, torch.bfloat16, -1, False)
    layer = torch.nn.Module()
    layer.weight_packed = torch.nn.Parameter(packing.flip(q.clone()).view(torch.int32), requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scale.bfloat16(), requires_grad=False)
    chosen = choose_mp_linear_kernel(about)(about, "weight_packed", "weight_scale")
    assert type(chosen) is cpu_kernels.OctavoPackedLinear
    chosen.process_weights_after_loading(layer)
    assert torch.equal(layer.weight_packed, q)
    apply = torch.compile(chosen.apply_weights, fullgraph=True) if compiled else chosen.apply_weights
    with torch.inference_mode():
        made = apply(layer, x, bias)
    wanted = F.linear(x.double(), schemes.dequantize(q, scale, "int8_channel", dtype=torch.float64), bias.double())
    assert (made.double() - wanted).norm() / wanted.norm() < 2**-7


@pytest.mark.parametrize(("bits", "group", "zero_points"), [(4, -1, False), (8, 128, False), (8, -1, True)])
def test_other_numbers_in_words_are_left_to_vllm(bits: int, group: int, zero_points: bool) -> None:
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}[bits]
    about = MPLinearLayerConfig((COLS, ROWS), (COLS, ROWS), kind, torch.bfloat16, group, zero_points)
    assert not cpu_kernels.OctavoPackedLinear.can_implement(about)[0]
