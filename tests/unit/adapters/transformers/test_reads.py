"""What a model's classes tell of their layers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from octavo.adapters.transformers.code import reachable
from octavo.adapters.transformers.reads import Reading, Reads


def bare(function):
    def wrapper(self, x):
        return function(self, x)

    return wrapper


def wrapping(function):
    return functools.wraps(function)(bare(function))


class Plain(nn.Module):
    def forward(self, x):
        return x @ self.proj.weight.T


class Inherited(Plain):
    def other(self):
        return None


class Bare(nn.Module):
    @bare
    def forward(self, x):
        return x @ self.proj.weight.T


class Wrapped(nn.Module):
    @torch.no_grad()
    @wrapping
    def forward(self, x):
        return x @ self.proj.weight.T


class Property(nn.Module):
    @property
    def dtype(self):
        return self.proj.weight.dtype

    def forward(self, x):
        return self.proj(x.to(self.dtype))


class Setter(nn.Module):
    @property
    def gain(self):
        return 1

    @gain.setter
    def gain(self, value):
        self.proj.weight.data *= value

    def forward(self, x):
        self.gain = 2
        return self.proj(x)


class Cached(nn.Module):
    @functools.cached_property
    def norm(self):
        return self.proj.weight.norm()

    def forward(self, x):
        return self.proj(x) / self.norm


class Static(nn.Module):
    @staticmethod
    def norm(self):
        return self.proj.weight.norm()

    def forward(self, x):
        return self.proj(x) / self.norm(self)


class Within(nn.Module):
    def forward(self, x):
        return [(lambda: x @ self.proj.weight)() for _ in range(2)]


class Scaling(nn.Module):
    def forward(self, x):
        return self.proj(x) * self.proj.weight_scale


class Unreached(nn.Module):
    def start(self):
        self.proj.weight.data.zero_()

    def forward(self, x):
        return self.proj(x)


class Casting(nn.Module):
    def forward(self, x):
        if isinstance(self.proj.weight, torch.Tensor) and x.dtype != self.proj.weight.dtype:
            x = x.to(self.proj.weight.dtype)
        return self.proj(x).view(self.proj.weight.size(0), -1)


class Training(nn.Module):
    def forward(self, x, cache=None):
        if self.training and cache is None:
            return x @ self.proj.weight.T
        return self.proj(x)


class Sliced(nn.Module):
    def forward(self, x):
        if self.slices > 1 and self.exact:
            return sum(x @ self.proj.weight[:, i].T for i in range(self.slices))
        return self.proj(x)


class Rescaling(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        self._rescale()
        return x

    def _rescale(self):
        for block in self.blocks:
            block.attention.output.weight.div_(2)


def read(cls: type, **attributes: object) -> Reading:
    """How the weight of the layer ``proj`` is read in a model of this class."""
    model = cls()
    model.proj = nn.Linear(4, 4)
    for name, value in attributes.items():
        setattr(model, name, value)
    modules = dict(nn.Sequential(model).named_modules())
    return Reads(modules, reachable({type(module) for module in modules.values()})).of("0.proj")


@pytest.mark.parametrize(
    "cls", [Plain, Inherited, Bare, Wrapped, Setter, Cached, Static, Within], ids=lambda cls: cls.__name__
)
def test_a_class_that_reads_the_numbers_of_its_layer_is_found(cls):
    assert read(cls) == Reading.NUMBERS


@pytest.mark.parametrize("cls", [Scaling, Unreached], ids=lambda cls: cls.__name__)
def test_a_class_that_only_calls_its_layer_is_not(cls):
    assert read(cls) == Reading.NOTHING


@pytest.mark.parametrize("cls", [Property, Casting], ids=lambda cls: cls.__name__)
def test_asking_for_the_dtype_or_shape_is_not_reading_numbers(cls):
    assert read(cls) == Reading.FORM


def test_what_training_alone_reads_is_told_apart():
    assert read(Training) == Reading.IN_TRAINING


@pytest.mark.parametrize(("slices", "reading"), [(1, Reading.IN_TRAINING), (2, Reading.NUMBERS)])
def test_conditions_are_those_of_the_module_at_hand(slices, reading):
    assert read(Sliced, slices=slices, exact=True) == reading
    assert read(Sliced, slices=slices, exact=False) == Reading.IN_TRAINING


def test_code_of_another_class_may_read_a_weight():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.ModuleDict({"output": nn.Linear(4, 4), "key": nn.Linear(4, 4)})

    modules = dict(Rescaling(nn.ModuleList([Block()])).named_modules())
    reads = Reads(modules, reachable({type(module) for module in modules.values()}))
    assert reads.of("blocks.0.attention.output") == Reading.NUMBERS
    assert reads.of("blocks.0.attention.key") == Reading.NOTHING
