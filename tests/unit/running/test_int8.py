"""Products with int8 weights on a CPU: which torch's kernel takes, and that it rounds once."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from helpers import random_weights
from octavo.numerics import schemes
from octavo.running import int8
from octavo.running.linear import linear
from octavo.running.weight_only import weight_only


def quantized(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = random_weights((rows, cols), torch.float32, 0) * torch.logspace(-3, 3, rows)[:, None]
    return schemes.quantize(weight, "int8_channel")


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
@pytest.mark.parametrize("cols", [64, 320])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_the_kernel_rounds_once(tokens: int, cols: int, rows: int) -> None:
    q, scale = quantized(rows, cols)
    x, bias = random_weights((tokens, cols), torch.bfloat16, 1), random_weights((rows,), torch.bfloat16, 2)
    assert int8.takes(x, q)
    exact = (x.double() @ q.double().T) * scale.double().T
    magnitude = (x.double().abs() @ q.double().abs().T) * scale.double().T
    bound = exact.abs() * 2.0**-8 + magnitude * cols * 2.0**-24
    assert bool(((linear(x, q, scale, "int8_channel").double() - exact).abs() <= bound).all())
    biased = linear(x, q, scale, "int8_channel", bias=bias)
    assert torch.equal(biased, linear(x, q, scale, "int8_channel") + bias)


def test_what_the_kernel_does_not_take_is_widened() -> None:
    q, scale = quantized(6, 64)
    x = random_weights((3, 64), torch.bfloat16, 1)
    assert int8.takes(x, q)
    wanting = x.clone().requires_grad_()
    ragged, ragged_scale = quantized(6, 40)  # the kernel would read beyond the end of a row
    cases = [
        (x.float(), q, scale),
        (x.half(), q, scale),
        (x[:0], q, scale),
        (wanting, q, scale),
        (x, quantized(64, 6)[0].T, scale),
        (x[:, :40], ragged, ragged_scale),
        (x, schemes.quantize(q.float(), "fp8_channel")[0], scale),
    ]
    for activations, weight, scales in cases:
        assert not int8.takes(activations, weight)
        if weight.dtype == torch.int8:
            found = linear(activations, weight, scales, "int8_channel")
            wanted = activations.double() @ (weight.double() * scales.double()).T
            assert torch.allclose(
                found.double(), wanted, rtol=2**-6, atol=wanted.abs().max().item() / 100 if len(wanted) else 0
            )
    linear(wanting, q, scale, "int8_channel").float().sum().backward()
    assert wanting.grad is not None
    with torch.no_grad():
        assert int8.takes(wanting, q)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it, for forward mode
@pytest.mark.parametrize("rows", [3, 12])
def test_gradients_come_by_either_mode_and_by_functional_transforms(rows: int) -> None:
    q, scale = quantized(6, 64)
    x, along = random_weights((rows, 64), torch.bfloat16, 1), random_weights((rows, 64), torch.bfloat16, 2)
    bias = random_weights((6,), torch.bfloat16, 3)
    weight = (q.double() * scale.double()).float()

    def product(x: torch.Tensor) -> torch.Tensor:
        return linear(x, q, scale, "int8_channel", bias=bias)

    def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return torch.allclose(found.float(), wanted, rtol=2**-6, atol=wanted.abs().max().item() / 100)

    forward = along.float() @ weight.T
    assert close(torch.func.jvp(product, (x,), (along,))[1], forward)
    with torch.no_grad():
        assert close(torch.func.jvp(product, (x,), (along,))[1], forward)
    with forward_ad.dual_level():
        assert close(forward_ad.unpack_dual(product(forward_ad.make_dual(x, along))).tangent, forward)
    assert int8._HAS_UNITS or int8.takes(x, q)  # as before, once that is over
    backward = torch.func.grad(lambda x: product(x).float().sum())(x)
    assert close(backward, torch.ones(rows, 6) @ weight)
    both = torch.func.jacfwd(product)(x), torch.func.jacrev(product)(x)
    assert close(both[0], both[1].float())


def test_a_product_in_few_rows_is_that_of_the_widened_weight() -> None:
    q, scale = quantized(300, 128)
    x = random_weights((2, 2, 128), torch.bfloat16, 1)
    found, widened = linear(x, q, scale, "int8_channel"), weight_only(x, q, scale, "int8_channel")
    assert found.shape == (2, 2, 300)
    assert torch.allclose(found.float(), widened.float(), rtol=2**-6, atol=1e-3)


def test_many_rows_are_widened_where_there_are_units_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    q, _ = quantized(6, 64)
    for has_units in (True, False):
        monkeypatch.setattr(int8, "_HAS_UNITS", has_units)
        assert int8.takes(torch.zeros(8, 64, dtype=torch.bfloat16), q)
        assert int8.takes(torch.zeros(9, 64, dtype=torch.bfloat16), q) is not has_units


def test_a_layer_that_takes_the_kernel_is_compiled_without_graph_breaks() -> None:
    q, scale = quantized(96, 128)

    def product(x: torch.Tensor) -> torch.Tensor:
        return linear(x, q, scale, "int8_channel")

    compiled = torch.compile(product, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for rows in (1, 5):
            x = random_weights((rows, 128), torch.bfloat16, rows)
            assert torch.equal(compiled(x), product(x))
