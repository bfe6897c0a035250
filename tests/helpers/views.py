"""Random views of a tensor."""

from __future__ import annotations

import torch
from hypothesis import strategies as st


def view_of(draw, first: torch.Tensor) -> torch.Tensor:
    """A random view, as loaders make them."""
    t = first
    for _ in range(draw(st.integers(0, 5))):
        name = draw(
            st.sampled_from(["narrow", "select", "transpose", "flatten", "unflatten", "step", "unsqueeze", "chunk"])
        )
        if not t.ndim or not t.numel():
            break
        dim = draw(st.integers(0, t.ndim - 1))
        n = t.shape[dim]
        if name == "narrow":
            start = draw(st.integers(0, n - 1))
            t = t.narrow(dim, start, draw(st.integers(1, n - start)))
        elif name == "select":
            t = t.select(dim, draw(st.integers(-n, n - 1)))
        elif name == "transpose":
            t = t.transpose(dim, -1)
        elif name == "flatten" and t.is_contiguous():
            t = t.view(-1)
        elif name == "unflatten":
            each = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
            t = t.unflatten(dim, (n // each, each))
        elif name == "step":
            t = t[(slice(None),) * dim + (slice(draw(st.integers(0, n - 1)), None, draw(st.integers(1, 3))),)]
        elif name == "unsqueeze":
            t = t.unsqueeze(dim)
        elif name == "chunk":
            t = draw(st.sampled_from(t.chunk(draw(st.integers(1, 4)), dim)))
    return t
