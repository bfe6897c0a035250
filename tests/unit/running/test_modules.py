"""What runs after loading: exact widening, and products against those of the dequantized weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import DTYPES, SCHEMES, random_weights
from octavo.numerics import schemes
from octavo.running import linear as matmul
from octavo.running import modules
from octavo.running.modules import QuantizedExperts, QuantizedLinear
from octavo.running.weight_only import widen


def finite_codes() -> torch.Tensor:
    """All 254 finite e4m3 numbers, negative zero included."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    assert len(codes) == 254
    return codes.view(torch.float8_e4m3fn)


def e4m3_value(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if code & 0x80 else magnitude


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_widening_is_exact_for_every_finite_code(dtype):
    q = finite_codes()
    wide = widen(q, dtype)
    assert wide.dtype == dtype
    assert wide.tolist() == [e4m3_value(c) for c in q.view(torch.uint8).tolist()]
    assert torch.equal(torch.signbit(wide), q.view(torch.int8) < 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_widening_leaves_the_codes_alone_and_takes_any_strides(dtype):
    q = finite_codes()[:252].view(18, 14)
    before = q.view(torch.uint8).clone()
    assert torch.equal(widen(q.t(), dtype), widen(q, dtype).t())
    assert torch.equal(widen(q[3:5], dtype), widen(q, dtype)[3:5])
    assert torch.equal(q.view(torch.uint8), before)


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_tensor"])
@pytest.mark.parametrize("rows", [1, 8])
def test_a_few_rows_in_bf16_are_summed_and_scaled_in_float32_and_rounded_once(rows, scheme):
    q, scale = quantized((96, 254), scheme)
    q[:, :] = finite_codes().expand(96, 254)  # subnormal ones, too
    x = random_weights((rows, 254), torch.bfloat16, 1)
    exact = x.double() @ schemes.dequantize(q, scale, scheme).double().T
    found = matmul.linear(x, q, scale, scheme)
    magnitude = x.double().abs() @ schemes.dequantize(q, scale, scheme).double().abs().T
    assert ((found.double() - exact).abs() <= exact.abs() * 2.0**-8 + magnitude * 254 * 2.0**-24).all()


def quantized(shape: tuple[int, ...], scheme: str, parts=None, seed: int = 0):
    weight = random_weights(shape, torch.float32, seed)
    weight *= torch.logspace(-3, 3, shape[-2])[:, None]  # scales that differ
    return schemes.quantize(weight, scheme, parts)


def assert_close(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Within the rounding of a product in x's dtype: of the weight, of the result, of its scaling and bias."""
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    unit = torch.finfo(x.dtype).eps / 2
    bound = (3 * unit + x.shape[-1] * 2.0**-24) * magnitude + torch.finfo(x.dtype).smallest_normal
    worst = ((found.double() - exact).abs() / bound).max().item()
    assert worst <= 1, f"{worst:.2f} times the bound"


@pytest.mark.parametrize("parts", [None, (300, 100)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_quantized_linear_layer_equals_one_with_dequantized_weights(scheme, dtype, parts):
    q, scale = quantized((400, 300), scheme, parts)
    weight = schemes.dequantize(q, scale, scheme, parts)
    bias = random_weights((400,), dtype, 1)
    layer = nn.Linear(300, 400, bias=True, device="meta")
    layer = QuantizedLinear(layer, scheme, parts)
    layer.weight, layer.weight_scale = (nn.Parameter(t, requires_grad=False) for t in (q, scale))
    layer.bias = nn.Parameter(bias)
    x = random_weights((2, 7, 300), dtype, 2)
    with torch.no_grad():
        y = layer(x)
    assert (y.shape, y.dtype) == ((2, 7, 400), dtype)
    assert_close(y.view(14, 400), x.view(14, 300), weight, bias)
    assert_close(matmul.linear(x[0, 0], q, scale, scheme, parts)[None], x[0, :1], weight)


@pytest.mark.parametrize("parts", [None, (300, 100)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_layer_is_compiled_without_graph_breaks(scheme, parts):
    q, scale = quantized((400, 300), scheme, parts)
    layer = QuantizedLinear(nn.Linear(300, 400, bias=False, device="meta"), scheme, parts)
    layer.weight, layer.weight_scale = (nn.Parameter(t, requires_grad=False) for t in (q, scale))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for rows in (2, 5):
            x = random_weights((rows, 300), torch.bfloat16, rows)
            assert torch.allclose(compiled(x), layer(x), rtol=2**-6, atol=1e-4)


def test_row_scales_are_never_folded_into_bf16_weights():
    """448 and 416, times 147 / 65536, need more bits than bf16 has: folded, their difference would be 4864 / 65536."""
    q = torch.tensor([[448.0, 416.0]]).to(torch.float8_e4m3fn)
    x = torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16)
    for scheme, scale in (("fp8_channel", torch.tensor([[147 / 65536]])), ("fp8_tensor", torch.tensor(147 / 65536))):
        assert matmul.linear(x, q, scale, scheme).tolist() == [[32 * 147 / 65536]]


def test_fp16_outputs_do_not_overflow_before_they_are_scaled():
    """448 * 300 is beyond fp16; scaled, it is not."""
    q = torch.full((2, 300), 448.0).to(torch.float8_e4m3fn)
    scale = torch.full((2, 1), 2.0**-10)
    y = matmul.linear(torch.ones(1, 300, dtype=torch.float16), q, scale, "fp8_channel")
    assert y.tolist() == [[131.25, 131.25]]


def test_no_tokens_give_no_rows():
    q, scale = quantized((400, 300), "fp8_channel")
    assert matmul.linear(torch.empty(0, 300), q, scale, "fp8_channel").shape == (0, 400)


def test_a_layer_is_made_without_storage():
    layer = QuantizedLinear(nn.Linear(300, 400, device="meta").eval(), "fp8_block")
    assert isinstance(layer, nn.Linear)
    assert (layer.weight.dtype, layer.weight.shape, layer.weight.device.type) == (schemes.FP8, (400, 300), "meta")
    assert (layer.weight_scale.shape, layer.weight_scale.device.type) == ((4, 3), "meta")
    assert not any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")
    assert set(layer.state_dict()) == {"weight", "weight_scale", "bias"}
    assert not layer.training
    assert str(layer) == "QuantizedLinear(in_features=300, out_features=400, bias=True, scheme=fp8_block)"


def test_a_linear_layer_is_quantized_in_its_model_and_wherever_it_is_listed():
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Sequential(nn.Linear(6, 8)))
    listed = list(model[1])
    modules.quantize_linear(model, "1.0", "fp8_tensor", (5, 3))
    assert isinstance(model[1][0], QuantizedLinear)
    assert list(modules.quantized_weights(model)) == [("1.0.weight", "fp8_tensor", (5, 3))]
    assert model[1][0].weight_scale.shape == (2, 1)
    assert listed[0] is model[1][0]
    assert list(listed[0].state_dict()) == ["weight", "weight_scale", "bias"]


# -- experts ----------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """As transformers' experts are: stacks, a gate of their own, flags."""

    def __init__(self, has_gate: bool = True, has_bias: bool = False, is_transposed: bool = False) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed = has_gate, has_bias, is_transposed
        up = "gate_up_proj" if has_gate else "up_proj"
        width = 40 if has_gate else 20
        shapes = {up: (3, width, 24), "down_proj": (3, 24, 20)}
        for seed, (name, shape) in enumerate(shapes.items()):
            weight = random_weights(shape, torch.float32, seed)
            setattr(self, name, nn.Parameter(weight.mT.contiguous() if is_transposed else weight))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(random_weights(shape[:2], torch.float32, 10 + seed)))
        self.act_fn = F.silu

    def _apply_gate(self, y: torch.Tensor) -> torch.Tensor:
        gate, up = y.chunk(2, -1)
        return F.silu(gate) * up

    def reference(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        up = "gate_up_proj" if self.has_gate else "up_proj"
        total = torch.zeros_like(x)
        for token, (experts, factors) in enumerate(zip(index.tolist(), weights, strict=True)):
            for expert, factor in zip(experts, factors, strict=True):
                if expert >= 3:
                    continue
                y = x[token]
                for name in (up, "down_proj"):
                    matrix = getattr(self, name)[expert]
                    y = y @ (matrix if self.is_transposed else matrix.T)
                    y = y + getattr(self, f"{name}_bias")[expert] if self.has_bias else y
                    if name == up:
                        y = self._apply_gate(y) if self.has_gate else F.silu(y)
                total[token] += y * factor
        return total


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "flags", [{}, {"has_bias": True}, {"has_gate": False}, {"is_transposed": True, "has_bias": True}], ids=str
)
def test_quantized_experts_equal_experts_with_dequantized_weights(scheme, flags):
    experts = Experts(**flags).requires_grad_(False)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    parts = {up: (20, 20) if experts.has_gate else (20,), "down_proj": (24,)}
    x = random_weights((5, 24), torch.float32, 20)
    index = torch.tensor([[0, 1], [2, 1], [1, 0], [2, 3], [0, 2]])  # 3 belongs to another rank
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    stacks = {}
    for name in parts:
        stack = getattr(experts, name).data
        q, scale = schemes.quantize(stack.mT if experts.is_transposed else stack, scheme, parts[name])
        back = schemes.dequantize(q, scale, scheme, parts[name])
        getattr(experts, name).data = back.mT if experts.is_transposed else back
        stacks[name] = (q, scale)
    expected = experts.reference(x, index, weights)

    for name, (q, scale) in stacks.items():
        modules.quantize_stack(experts, name, scheme, tuple(q.shape), parts[name])
        assert getattr(experts, f"{name}_scale").shape == scale.shape
        setattr(experts, name, nn.Parameter(q, requires_grad=False))
        setattr(experts, f"{name}_scale", nn.Parameter(scale, requires_grad=False))
    assert isinstance(experts, QuantizedExperts)
    assert type(experts).__name__ == "QuantizedExperts"
    assert torch.allclose(experts(x, index, weights), expected, rtol=1e-4, atol=1e-6)
    assert experts(x.view(1, 5, 24), index, weights).shape == (1, 5, 24)
    assert list(modules.quantized_weights(SimpleModel(experts))) == [
        (f"experts.{name}", scheme, parts[name]) for name in stacks
    ]


class SimpleModel(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def test_a_stack_that_the_recipe_kept_is_used_as_it_is():
    experts = Experts(is_transposed=True).requires_grad_(False)
    x, weights = random_weights((2, 24), torch.float32, 20), torch.ones(2, 1)
    index = torch.tensor([[0], [2]])
    q, scale = schemes.quantize(experts.down_proj.mT, "fp8_channel")
    experts.down_proj.data = schemes.dequantize(q, scale, "fp8_channel").mT
    expected = experts.reference(x, index, weights)
    modules.quantize_stack(experts, "down_proj", "fp8_channel", tuple(q.shape), (24,))
    experts.down_proj = nn.Parameter(q, requires_grad=False)
    experts.down_proj_scale = nn.Parameter(scale, requires_grad=False)
    assert torch.allclose(experts(x, index, weights), expected, rtol=1e-4, atol=1e-6)


def test_scales_are_named_after_their_weight():
    assert modules.scale_name("a.weight") == "a.weight_scale"
    assert modules.scale_name("experts.gate_up_proj") == "experts.gate_up_proj_scale"


@pytest.mark.parametrize("scheme", list(schemes.SCHEMES))
def test_gradients_reach_the_activations_of_a_layer_of_many_steps(scheme):
    q, scale = schemes.quantize((torch.randn(300, 64) * 0.02).bfloat16(), scheme)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    matmul.linear(x, q, scale, scheme).float().sum().backward()
    expected = schemes.dequantize(q, scale, scheme).sum(0)
    assert torch.allclose(x.grad[0].float(), expected, rtol=0.05, atol=0.05)
