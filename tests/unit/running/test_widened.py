"""FP8 weights that read as their values: views, products, and anything else that code does with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import SCHEMES, random_weights
from octavo.errors import LoaderError
from octavo.numerics import schemes
from octavo.running import modules
from octavo.running.modules import QuantizedLinear, ReadLinear
from octavo.running.widened import Codes, Values, Widened

SHAPE = (3, 200, 136)


def weight(scheme: str = "fp8_channel", parts=None, **options) -> tuple[Widened, Tensor]:
    """A stack that stands for its codes, and the values of these."""
    q, scale = schemes.quantize(random_weights(SHAPE, torch.float32, 0), scheme, parts)
    values = schemes.dequantize(q, scale, scheme, parts)
    return Widened(Codes(q, scale, scheme, parts), torch.float32, **options), values


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


FUNCTIONS = {
    "linear": lambda w: F.linear(x(5, 136), w[2], x(200)),
    "linear, a tensor for an index": lambda w: F.linear(x(5, 136), w[torch.tensor(2)]),
    "linear, across": lambda w: F.linear(x(5, 200), w[1].T, x(136)),
    "matmul of one": lambda w: x(2, 5, 136) @ w[1].T,
    "matmul across": lambda w: torch.matmul(x(5, 200), w[1]),
    "bmm": lambda w: torch.bmm(x(3, 5, 136), w.transpose(1, 2)),
    "bmm across": lambda w: x(3, 5, 200).bmm(w),
    "of one operand for all": lambda w: x(5, 136) @ w.mT,
    "of a wider batch": lambda w: torch.matmul(x(2, 3, 1, 136), w.transpose(-1, -2)[None]),
    "of several": lambda w: torch.bmm(x(2, 5, 136), w[torch.tensor([2, 0])].permute(0, 2, 1)),
    "of a slice": lambda w: torch.bmm(x(2, 5, 136), w[1:].mT),
    "of selected ones": lambda w: torch.bmm(x(2, 5, 136), torch.index_select(w, 0, torch.tensor([2, 2])).mT),
    "of each": lambda w: torch.stack([x(5, 136) @ one.t() for one in w.unbind()]),
    "of an axis more": lambda w: torch.matmul(x(4, 1, 5, 136), w.mT.unsqueeze(0)),
    "einsum": lambda w: torch.einsum("eni,eoi->eno", x(3, 5, 136), w),
    "baddbmm": lambda w: torch.baddbmm(x(3, 1, 200), x(3, 5, 136), w.mT),
    "parts of rows": lambda w: F.linear(x(5, 136), w[1, 10:30]),
    "arithmetic": lambda w: w[0] * 2 - w[1],
    "a sum": lambda w: w.sum(),
    "into another": lambda w: torch.zeros(SHAPE).copy_(w),
    "as another dtype": lambda w: w[1].to(torch.float64),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("scheme", "parts"), [*((s, None) for s in SCHEMES), ("fp8_block", (70, 130))], ids=str)
def test_whatever_is_done_with_it_is_done_with_its_values(name, scheme, parts):
    widened, values = weight(scheme, parts)
    found, wanted = FUNCTIONS[name](widened), FUNCTIONS[name](values)
    found = found.plain() if isinstance(found, Widened) else found
    assert type(found) is Tensor
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def test_it_tells_what_its_values_would():
    widened, values = weight()
    for of in (lambda w: w, lambda w: w[0], lambda w: w.mT, lambda w: w[:, None]):
        assert isinstance(of(widened), Widened)
        assert (of(widened).shape, of(widened).dtype, of(widened).device) == (
            of(values).shape,
            torch.float32,
            values.device,
        )
    assert widened.is_floating_point()
    assert isinstance(widened, Tensor)
    assert "Widened([3, 200, 136], fp8_channel" in repr(widened)


def test_a_stack_may_be_stored_the_other_way_round():
    widened, values = weight(flipped=True)
    assert widened.shape == (3, 136, 200)
    torch.testing.assert_close(torch.bmm(x(3, 5, 136), widened), torch.bmm(x(3, 5, 136), values.mT))
    assert torch.equal(widened.plain(), values.mT)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_stack_may_read_as_one_matrix_of_all_rows(flipped):
    inner = (136, 200) if flipped else (200, 136)
    widened, values = weight(flipped=flipped, shape=(3 * inner[0], inner[1]))
    values = values.mT if flipped else values
    apart = widened.view(-1, *inner)
    assert isinstance(apart, Widened)
    torch.testing.assert_close(x(5, inner[1]) @ apart[2].T, x(5, inner[1]) @ values[2].T)
    assert torch.equal(widened.plain(), values.reshape(-1, inner[1]))
    assert torch.equal(widened[:7] + 0, values.reshape(-1, inner[1])[:7])


def test_gradients_of_activations_go_through_it():
    widened, values = weight()
    gradients = []
    for stack in (widened, values):
        inputs = x(3, 5, 136).requires_grad_()
        torch.bmm(inputs, stack.mT).square().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)


WRITES = {
    "add_": lambda w: w.add_(1),
    "data +=": lambda w: w.data.__iadd__(x(*SHAPE)),
    "data =": lambda w: setattr(w, "data", x(*SHAPE)),
    "copy_": lambda w: w.copy_(x(*SHAPE)),
    "[0] =": lambda w: w.__setitem__(0, 0),
    "init": nn.init.zeros_,
}


@pytest.mark.parametrize("name", [name for name in WRITES if "+=" not in name])
def test_it_can_not_be_written(name):
    widened, values = weight()
    for stack in (widened, values.clone().as_subclass(Values)):
        with pytest.raises(LoaderError, match="can't be changed in place"):
            WRITES[name](stack)


def test_adding_to_its_data_is_refused():
    widened, _ = weight()

    class Holder:
        weight = widened

    with pytest.raises(LoaderError, match="can't be changed in place"):
        Holder.weight.data += x(*SHAPE)


# -- layers whose weight is read --------------------------------------------------------------------------------------


def layer(kind: type[QuantizedLinear] = ReadLinear) -> tuple[QuantizedLinear, Tensor]:
    model = nn.Sequential(nn.Linear(136, 200, device="meta", dtype=torch.bfloat16))
    modules.quantize_linear(model, "0", "fp8_block", (200,), kind)
    q, scale = schemes.quantize(random_weights((200, 136), torch.bfloat16, 0), "fp8_block")
    made = model[0]
    made.weight, made.weight_scale = nn.Parameter(q, False), nn.Parameter(scale, False)
    made.bias = nn.Parameter(torch.zeros(200, dtype=torch.bfloat16))
    return made, schemes.dequantize(q, scale, "fp8_block", dtype=torch.bfloat16)


def test_a_layer_answers_for_its_weight_once_it_serves():
    made, values = layer()
    assert made.weight.dtype == schemes.FP8  # whoever loads weights meets them as they are
    modules.serve(nn.Sequential(made))
    assert made.weight.dtype == torch.bfloat16
    assert torch.equal(made.weight + 0, values)
    assert dict(made.named_parameters())["weight"].dtype == schemes.FP8
    assert made.state_dict()["weight"].dtype == schemes.FP8


def test_code_that_torch_does_not_know_gets_values_with_memory_in_training():
    made, values = layer()
    made.is_read_in_training = True
    modules.serve(made)
    assert isinstance(made.train().weight, Values)
    assert made.weight.data_ptr()
    assert torch.equal(made.weight + 0, values)
    assert isinstance(made.eval().weight, Widened)


def test_asking_for_the_compute_dtype_makes_a_layer_answer_for_its_weight():
    made, values = layer(QuantizedLinear)
    before = made(x(4, 136).bfloat16())
    assert made.weight.dtype == schemes.FP8
    assert made.compute_dtype == torch.bfloat16
    assert torch.equal(made.weight + 0, values)
    assert torch.equal(made(x(4, 136).bfloat16()), before)


def test_a_layer_whose_codes_something_has_cast_says_so():
    made, _ = layer()
    made._parameters["weight"] = nn.Parameter(torch.zeros(200, 136))
    with pytest.raises(TypeError, match=r"holds torch\.float32 where quantized numbers were"):
        made(x(4, 136))


def test_a_layer_that_answers_can_be_compiled():
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wo, _ = layer()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.wo(inputs.to(self.wo.weight.dtype))

    model = Casting().eval()
    modules.serve(model)
    inputs = x(4, 136).bfloat16()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(inputs), model(inputs))
