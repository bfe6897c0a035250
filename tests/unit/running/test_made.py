"""Modules of classes that no module has: pickled, saved and copied they are what they were."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from octavo.running.modules import Form, QuantizedExperts, ReadStacks, quantize_read_stack, quantize_stack, serve

SHAPE = (2, 8, 32)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(SHAPE))
        self.down = nn.Parameter(torch.randn(SHAPE))


class Reduced(Experts):
    """Makes itself anew in a way of its own."""

    def __reduce__(self) -> Any:
        return Reduced, ()


def quantized(cls: type[Experts] = Experts, both: bool = False) -> Any:
    experts = cls()
    if both:
        quantize_stack(experts, "down", "int8_channel", SHAPE, (8,))
    quantize_read_stack(experts, "up", "int8_channel", SHAPE, (8,), Form(torch.float32))
    for name, parameter in list(experts._parameters.items()):
        made = torch.ones(parameter.shape, dtype=parameter.dtype)
        experts._parameters[name] = nn.Parameter(made, requires_grad=False)
    serve(experts)
    return experts


def assert_equal(again: Any, experts: Any) -> None:
    assert type(again) is type(experts)
    assert again.octavo_stacks == experts.octavo_stacks
    assert torch.equal(again.up.plain(), experts.up.plain())
    state, expected = again.state_dict(), experts.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_stacks_are_pickled(protocol: int, both: bool) -> None:
    experts = quantized(both=both)
    mixins = [base for base in type(experts).__mro__ if base in (ReadStacks, QuantizedExperts)]
    assert mixins == [ReadStacks, QuantizedExperts][: 1 + both]
    assert_equal(pickle.loads(pickle.dumps(experts, protocol)), experts)


@pytest.mark.parametrize("both", [False, True])
def test_stacks_are_saved_and_copied(both: bool) -> None:
    experts = quantized(both=both)
    file = io.BytesIO()
    torch.save(experts, file)
    file.seek(0)
    assert_equal(torch.load(file, weights_only=False), experts)
    copied = copy.deepcopy(experts)
    assert_equal(copied, experts)
    assert copied._parameters["up"].data_ptr() != experts._parameters["up"].data_ptr()


def test_another_process_makes_the_class_anew() -> None:
    quantize_stack(layer := nn.Bilinear(32, 8, 2), "weight", "int8_channel", (2, 32, 8), (32,))
    layer._parameters.clear()
    code = "import sys, pickle; print([base.__name__ for base in type(pickle.load(sys.stdin.buffer)).__mro__])"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(layer), capture_output=True)
    assert done.stdout.decode().strip() == str([base.__name__ for base in type(layer).__mro__]), done.stderr.decode()


def test_a_class_derived_from_one_that_was_made_says_itself_what_it_is() -> None:
    experts = quantized()
    experts.__class__ = type("Sharded", (type(experts),), {})
    with pytest.raises((pickle.PicklingError, AttributeError), match="Sharded"):
        pickle.dumps(experts)


def test_a_base_that_makes_itself_anew_is_asked() -> None:
    assert type(pickle.loads(pickle.dumps(quantized(Reduced)))) is Reduced
