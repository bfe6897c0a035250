"""What a model's classes tell of their layers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from octavo.adapters.transformers.facts import _reads_weight


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


class Setter(nn.Module):
    @property
    def gain(self):
        return 1

    @gain.setter
    def gain(self, value):
        self.proj.weight.data *= value


class Cached(nn.Module):
    @functools.cached_property
    def norm(self):
        return self.proj.weight.norm()


class Static(nn.Module):
    @staticmethod
    def norm(self):
        return self.proj.weight.norm()


class Within(nn.Module):
    def forward(self, x):
        return [(lambda: x @ self.proj.weight)() for _ in range(2)]


class Scaling(nn.Module):
    def forward(self, x):
        return self.proj(x) * self.proj.weight_scale


@pytest.mark.parametrize(
    "cls", [Plain, Inherited, Bare, Wrapped, Property, Setter, Cached, Static, Within], ids=lambda cls: cls.__name__
)
def test_a_class_that_reads_the_weight_of_its_layer_is_found(cls):
    assert _reads_weight(cls, "proj")
    assert not _reads_weight(cls, "other")


@pytest.mark.parametrize("cls", [Scaling, nn.ModuleList, nn.Module], ids=lambda cls: cls.__name__)
def test_a_class_that_only_calls_its_layer_is_not(cls):
    assert not _reads_weight(cls, "proj")
