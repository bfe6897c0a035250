"""Whatever a loader does to a tensor before it copies it, what a dry run tells of it is what it does."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from octavo.elements.dry_run import Source, trace


def changed(tensor, steps):
    """The tensor after some steps, each a number for what is done and one for where."""
    for step, where in steps:
        axis = where % max(1, tensor.ndim)
        size = tensor.shape[axis]
        if step == "narrow" and size > 1:
            tensor = tensor.narrow(axis, where % (size - 1), size - where % (size - 1) - (where % 3 == 0))
        elif step == "swap" and tensor.ndim > 1:
            tensor = tensor.transpose(axis, (axis + 1) % tensor.ndim)
        elif step == "contiguous":
            tensor = tensor.contiguous()
        elif step == "clone":
            tensor = tensor.clone()
        elif step == "split" and size % 2 == 0:
            tensor = tensor.unflatten(axis, (2, size // 2))
        elif step == "merge" and axis + 1 < tensor.ndim:
            tensor = tensor.flatten(axis, axis + 1)
        elif step == "every other":
            tensor = tensor[(slice(None),) * axis + (slice(where % 2 if size > 1 else 0, None, 2),)]
        elif step == "roll" and tensor.ndim:
            tensor = torch.cat([tensor.narrow(axis, 1, size - 1), tensor.narrow(axis, 0, 1)], axis)
        elif step == "stack" and tensor.numel() < 100:
            tensor = torch.stack([tensor, tensor], axis)
    return tensor


class Changing(nn.Module):
    def __init__(self, shape, steps, transposed):
        super().__init__()
        self.steps = steps
        weight = torch.zeros(tuple(reversed(shape)) if transposed else shape)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.place = self.weight.data.permute(*reversed(range(len(shape)))) if transposed else self.weight.data

    def load_weights(self, weights):
        for _, tensor in weights:
            self.place.copy_(changed(tensor, self.steps))


@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3),
    steps=st.lists(
        st.tuples(
            st.sampled_from(
                ["narrow", "swap", "contiguous", "clone", "split", "merge", "every other", "roll", "stack"]
            ),
            st.integers(0, 11),
        ),
        max_size=7,
    ),
    transposed=st.booleans(),
)
def test_views_and_places_that_are_told_make_what_the_loader_makes(shape, steps, transposed):
    source = torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)
    result = changed(source, steps)
    if not result.numel():
        return
    model = Changing(tuple(result.shape), steps, transposed)
    seen = trace(model, model.load_weights, [Source("a", tuple(shape), torch.float32)])
    assert seen.failed is None
    model.load_weights([("a", source)])
    if seen.opaque or any(copy.view is None for copy in seen.copies):
        return  # left to the loader
    made = torch.zeros_like(model.weight)
    for copy in seen.copies:
        view, into = copy.view, copy.into
        values = source.flatten().as_strided(view.size, view.strides, view.offset)
        made.as_strided(into.size, into.strides, into.offset).copy_(values)
        assert copy.box.numel == values.numel()
    assert torch.equal(made, model.weight)
