"""Random programs of movements, on symbols and on real tensors: the pieces must tell what the tensors hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import assemble
from helpers.properties import examples
from octavo.elements.boxes import coverage_problem
from octavo.elements.symbolic import Symbolic


def factorings(n: int) -> list[tuple[int, int]]:
    return [(d, n // d) for d in range(1, n + 1) if n % d == 0]


def move(draw, first: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Draw a movement that a tensor like ``first`` can make."""
    whole = ["unsqueeze", "permute", "flatten"]
    small = ["double", "stack"] if first.numel() < 500 else []
    axes = ["halves", "narrow", "split", "select", "unflatten", "transpose", "reshape"] if first.ndim else []
    name = draw(st.sampled_from(whole + small + axes))
    dim = draw(st.integers(0, first.ndim - 1)) if first.ndim else 0
    if name == "permute":
        order = draw(st.permutations(range(first.ndim)))
        return lambda t: t.permute(order)
    if name == "narrow":
        start = draw(st.integers(0, first.shape[dim] - 1))
        length = draw(st.integers(1, first.shape[dim] - start))
        return lambda t: t.narrow(dim, start, length)
    if name == "split":
        size = draw(st.integers(1, first.shape[dim]))
        return lambda t: t.split(size, dim)[-1]
    if name == "select":
        index = draw(st.integers(-first.shape[dim], first.shape[dim] - 1))
        return lambda t: t.select(dim, index)
    if name == "unflatten":
        sizes = draw(st.sampled_from(factorings(first.shape[dim])))
        return lambda t: t.unflatten(dim, sizes)
    if name == "reshape":
        shape = draw(st.sampled_from(factorings(first.numel())))
        return lambda t: t.reshape(shape)
    return {
        "unsqueeze": lambda t: t.unsqueeze(dim),
        "flatten": lambda t: t.reshape(-1),
        "halves": lambda t: torch.cat(t.chunk(2, dim)[::-1], dim),
        "double": lambda t: torch.cat([t, t], dim) if t.ndim else t,
        "stack": lambda t: torch.stack([t, t], dim),
        "transpose": lambda t: t.transpose(dim, -1),
    }[name]


@examples(150)
@given(st.data())
def test_any_program_of_movements_is_followed(data):
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)
    sources = {"a": numbers, "b": numbers + 10_000}
    dim = data.draw(st.integers(0, len(shape) - 1))
    real = torch.cat(list(sources.values()), dim)
    symbolic = torch.cat([Symbolic.source(name, shape, torch.float32) for name in sources], dim)
    for _ in range(data.draw(st.integers(0, 6))):
        apply = move(data.draw, real)
        real, symbolic = apply(real), apply(symbolic)
    assert symbolic.shape == real.shape
    assert coverage_problem(symbolic.shape, symbolic.pieces) is None
    assert torch.equal(assemble(symbolic.shape, symbolic.pieces, sources), real)
