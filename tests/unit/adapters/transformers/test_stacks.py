"""Which parameters a class's code multiplies by as stacks of matrices, and along which axis."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

from octavo.adapters.transformers.code import reachable
from octavo.adapters.transformers.stacks import Stack, Stacks


class Module(nn.Module):
    shape: tuple[int, ...] = (6, 4, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.empty(self.shape))
        self.rows = 4


class Indexed(Module):
    def forward(self, x, experts):
        return [F.linear(x, self.stack[i]) for i in experts]


class Batched(Module):
    def forward(self, x):
        x = x.view(self.stack.shape[0], -1, 4)
        return torch.bmm(x, self.stack)


class Turned(Module):
    def forward(self, x):
        return torch.bmm(x, self.stack.transpose(1, 2))


class OneTurned(Module):
    def forward(self, x, i):
        return x.matmul(self.stack[i].T)


class Selected(Module):
    def forward(self, x, which=None):
        chosen = torch.index_select(self.stack, 0, which) if which is not None else self.stack
        chosen = chosen.transpose(1, 2)[None, :, :, :]
        return torch.matmul(x[:, :, None, :], chosen)


class Operator(Module):
    def forward(self, x):
        return x @ self.stack.mT


class Joined(Module):
    shape = (24, 8)

    def forward(self, x, i):
        apart = (-1, self.rows, 8)
        return x @ self.stack.view(apart)[i].T


class JoinedAcross(Module):
    shape = (24, 8)

    def forward(self, x, i):
        return x @ self.stack.view(-1, self.rows, 8)[i]


class Passed(Module):
    def forward(self, x, i):
        return self.multiply(x, self.stack[i])

    def multiply(self, x, matrix):
        return F.linear(x, matrix)


class TrainingToo(Module):
    def forward(self, x, i):
        if self.training:
            x = x + self.stack.sum()
        return F.linear(x, self.stack[i])


FOLLOWED = {
    Indexed: Stack(False),
    Batched: Stack(True),
    Turned: Stack(False),
    OneTurned: Stack(False),
    Selected: Stack(False),
    Operator: Stack(False),
    Joined: Stack(False, (6, 4, 8)),
    JoinedAcross: Stack(True, (6, 4, 8)),
    Passed: Stack(False),
    TrainingToo: Stack(False),
}


class Table(Module):
    def forward(self, x):
        return x + self.stack


class Looked(Module):
    def forward(self, i):
        return self.stack[i]


class BothWays(Module):
    def forward(self, x, y):
        return torch.bmm(x, self.stack), torch.bmm(y, self.stack.mT)


class Left(Module):
    def forward(self, x):
        return torch.matmul(self.stack, x)


class Cut(Module):
    def forward(self, x, i):
        return F.linear(x, self.stack[i, :2])


class Matrix(Module):
    shape = (24, 8)

    def forward(self, x):
        return F.linear(x, self.stack)


class Uneven(Module):
    shape = (25, 8)

    def forward(self, x, i):
        return x @ self.stack.view(-1, self.rows, 8)[i].T


class Lent(Module):
    def forward(self, x):
        return some_function(x, self.stack)  # noqa: F821


class Token(Module):
    shape = (1, 4, 8)

    def forward(self, x):
        return torch.matmul(x, self.stack)


class Unused(Module):
    def forward(self, x):
        return x


def found(cls: type[Module]) -> Stack | None:
    modules = dict(nn.Sequential(cls()).named_modules())
    return Stacks(modules, reachable({type(module) for module in modules.values()})).find("0", "stack")


@pytest.mark.parametrize("cls", FOLLOWED, ids=lambda cls: cls.__name__)
def test_a_stack_is_followed_to_its_products(cls):
    assert found(cls) == FOLLOWED[cls]


@pytest.mark.parametrize(
    "cls", [Table, Looked, BothWays, Left, Cut, Matrix, Uneven, Lent, Token, Unused], ids=lambda cls: cls.__name__
)
def test_what_is_used_otherwise_is_none(cls):
    assert found(cls) is None


def test_code_of_the_module_around_may_read_it():
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.empty(24, 8))

        def forward(self, x, matrix):
            return x.matmul(matrix)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Weights()

        def forward(self, x, i):
            matrix = self.mlp.stack.view(6, 4, 8)[i]
            return self.mlp(x, matrix)

    modules = dict(Around().named_modules())
    stacks = Stacks(modules, reachable({type(module) for module in modules.values()}))
    assert stacks.find("mlp", "stack") == Stack(True, (6, 4, 8))
