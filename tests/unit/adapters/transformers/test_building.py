"""Tensors that modules make while a model is built: the dtypes that they have under another default dtype of torch."""

import pytest
import torch
from torch import nn

from octavo.adapters.transformers.building import unallocated


class Old(nn.Module):
    """A module that uses the constructors of old."""

    def __init__(self) -> None:
        super().__init__()
        self.sized = nn.Parameter(torch.Tensor(3, 4))
        self.random = nn.Parameter(torch.Tensor(3).uniform_())
        self.given = nn.Buffer(torch.Tensor([True]))
        self.linear = nn.Linear(4, 4)
        self.told = nn.Buffer(torch.ones(2, dtype=torch.float32))
        self.numbers = nn.Buffer(torch.arange(3))
        self.computed = nn.Buffer(torch.arange(3).float() / 2)


class Float(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sized = nn.Parameter(torch.FloatTensor(3, 4))
        self.old = Old()


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("cls", [Old, Float])
def test_each_tensor_has_the_dtype_that_torch_would_give_it(cls: type[nn.Module], values: bool) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        wanted = {name: tensor.dtype for name, tensor in cls().state_dict().items()}
    finally:
        torch.set_default_dtype(before)
    with unallocated(torch.bfloat16, values=values):
        made = cls().state_dict()
    assert {name: tensor.dtype for name, tensor in made.items()} == wanted
    assert set(wanted.values()) >= {torch.bfloat16, torch.float32, torch.int64}


def test_numbers_that_old_constructors_are_given_stay() -> None:
    with unallocated(torch.bfloat16, values=False):
        made = torch.Tensor([1.5, 2])
    assert made.tolist() == [1.5, 2]
    assert torch.Tensor([1.5]).dtype == torch.float32  # in this thread again
