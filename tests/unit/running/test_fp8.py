"""What of the forward on FP8 units runs on a CPU: quantizing activations without Triton, row-wise products, shapes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers import random_weights
from octavo.numerics import schemes
from octavo.running import fp8, library
from octavo.running import linear as matmul

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_triton(monkeypatch):
    """Triton may be installed, but has no CPU to run on."""
    for module in (fp8, library):
        monkeypatch.setattr(module, "kernels", lambda: None)


def activations(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    x = random_weights((rows, cols), torch.float32, 3) * 50
    x[rows // 2] = 0
    x[:, cols // 2 :] *= 1e-3
    return x.to(dtype)


def assert_rounded(back: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> None:
    """As the docstring of `octavo.running.fp8` says; one more unit of float32 for the division."""
    bound = torch.maximum(x.float().abs() / 16, scale * 2.0**-10) * (1 + 2.0**-22)
    assert ((back - x.float()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_activations_have_one_scale_a_row(dtype):
    x = activations(6, 300, dtype)
    q, scale = library.quantize_rows(x.view(2, 3, 300))
    assert (q.shape, q.dtype, scale.shape, scale.dtype) == ((6, 300), schemes.FP8, (6, 1), torch.float32)
    assert scale[3] == 1
    assert_rounded(q.float() * scale, x, scale)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_activations_have_a_scale_for_128_columns_of_a_row_and_rows_in_fours(dtype):
    x = activations(6, 300, dtype)
    q, scale = library.quantize_groups(x.view(2, 3, 300))
    assert (q.shape, scale.shape, scale.stride()) == ((8, 300), (3, 8), (8, 1))
    assert not q[6:].float().any()
    each = scale.t().repeat_interleave(128, -1)[:6, :300]
    assert_rounded(q[:6].float() * each, x, each)


@pytest.mark.parametrize(
    ("scheme", "parts"),
    [("fp8_channel", (48,)), ("fp8_channel", (32, 16)), ("fp8_tensor", (48,)), ("fp8_tensor", (40, 8))],
)
def test_each_row_of_a_weight_gets_its_scale(scheme, parts):
    _, scale = schemes.quantize(random_weights((48, 32), torch.float32, 0), scheme, parts)
    found = library.row_of_scales(scale, parts)
    assert torch.equal(found, schemes.row_scales(scale, (48, 32), scheme, parts).view(1, 48))
    assert found.is_contiguous()


@pytest.mark.skipif(not hasattr(F, "scaled_mm"), reason="needs torch 2.10")
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("scheme", "parts"), [("fp8_channel", (64,)), ("fp8_tensor", (64,)), ("fp8_tensor", (48, 16))])
def test_a_product_of_quantized_rows_is_within_the_stated_bounds(scheme, parts, with_bias):
    q, scale = schemes.quantize(random_weights((64, 128), torch.float32, 0), scheme, parts)
    weight = schemes.dequantize(q, scale, scheme, parts).double()
    x = activations(5, 128)
    bias = random_weights((64,), torch.bfloat16, 1) if with_bias else None
    y = library.product(x.view(1, 5, 128), q, scale, bias, by_block=False, parts=parts)
    assert (y.shape, y.dtype) == ((1, 5, 64), torch.bfloat16)
    exact, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    tiny = x.double().abs().amax(-1, keepdim=True) / 448 * 2.0**-10 * weight.abs().sum(-1)
    assert ((y[0].double() - exact).abs() <= (1 / 16 + 2.0**-7) * magnitude + tiny).all()


@pytest.mark.parametrize(
    ("shape", "scheme", "parts", "expected"),
    [
        ((96, 64), "fp8_channel", (96,), True),
        ((100, 64), "fp8_channel", (100,), False),
        ((96, 72), "fp8_tensor", (96,), False),
        ((96, 64), "mxfp8", (96,), False),
    ],
)
def test_the_library_is_not_asked_for_what_it_does_not_take(shape, scheme, parts, expected):
    assert library.takes(shape, scheme, parts, torch.bfloat16, (9, 0)) == expected


def test_a_cpu_has_no_fp8_units():
    assert not fp8.takes(torch.empty(1, 8, dtype=torch.bfloat16), torch.empty(8, 8, dtype=schemes.FP8))


def test_compiled_operations_know_the_shapes_of_their_results():
    with FakeTensorMode():
        x, q = torch.empty(2, 5, 64, dtype=torch.float16), torch.empty(48, 64, dtype=schemes.FP8)
        y = torch.ops.octavo.linear(x, q, torch.empty(48, 1), "fp8_channel", [48], None)
        assert (y.shape, y.dtype) == ((2, 5, 48), torch.float16)
        ids = torch.empty(20, dtype=torch.int64)
        found = torch.ops.octavo.sort_routes(ids, 7)
        assert [(t.shape[0], t.dtype) for t in found] == [
            (20, torch.int64),
            (20, torch.int32),
            (7, torch.int32),
            (20, torch.int32),
        ]
        stack, scale = torch.empty(7, 48, 64, dtype=schemes.FP8), torch.empty(7, 48, 1)
        y = torch.ops.octavo.expert_linear(x[0], stack, scale, "fp8_channel", [48], None, *found[:3], 4, True)
        assert (y.shape, y.dtype) == ((20, 48), torch.float16)
        assert torch.ops.octavo.combine(y, ids.view(5, 4), torch.empty(5, 4), 7, found[3]).shape == (5, 48)


class _Forward(torch.nn.Module):
    """Every operation, as the modules call them."""

    def forward(self, x, q, scale, stack, stack_scale, ids, weights):
        y = matmul.linear(x, q, scale, "fp8_channel", None, None)
        found, order, ends, position = fp8.sort_routes(ids.reshape(-1), stack.shape[0])
        z = fp8.expert_linear(y, stack, stack_scale, "fp8_channel", (64,), None, found, order, ends, 2, True)
        return fp8.combine(z, ids, weights, stack.shape[0], position)


def test_under_torch_compile_each_is_one_opaque_operation(monkeypatch):
    monkeypatch.setattr(fp8, "has_units", lambda index: True)
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):  # no GPU is needed for tensors without data
        inputs = (
            torch.empty(5, 48, dtype=torch.bfloat16),
            torch.empty(64, 48, dtype=schemes.FP8),
            torch.empty(64, 1),
            torch.empty(3, 64, 64, dtype=schemes.FP8),
            torch.empty(3, 64, 1),
            torch.empty(5, 2, dtype=torch.int64),
            torch.empty(5, 2),
        )
        program = torch.export.export(_Forward(), inputs, strict=True)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    mine = [name.split(".")[1] for name in called if name.startswith("octavo.")]
    assert mine == ["linear", "sort_routes", "expert_linear", "combine"]
