"""Dry runs of a loader, on toy models: what is noted, and that nothing is touched."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.elements.boxes import Box
from octavo.elements.dry_run import Copy, Source, trace
from octavo.elements.views import View
from octavo.errors import CoverageError


class Fused(nn.Module):
    """q, k and v in one parameter; a bias; a table that is padded with zeros; a scale that is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.full((12, 6), 7.0))
        self.bias = nn.Parameter(torch.full((4,), 7.0))
        self.table = nn.Parameter(torch.full((8, 6), 7.0))
        self.register_buffer("factor", torch.full((1,), 7.0))

    def load_weights(self, weights):
        for name, weight in weights:
            if name in "qkv":
                at = "qkv".index(name) * 4
                self.qkv.data[at : at + 4].copy_(weight.to("cpu"))
            elif name == "table":
                self.table.data[: len(weight)].copy_(weight)
                self.table.data[len(weight) :].fill_(0)
            elif name == "factor":
                self.factor.fill_(weight.item())
            elif name == "negated":
                self.bias.data.copy_(-weight)
            elif name == "permuted":
                self.qkv.data.copy_(weight.view(2, 6, 6).transpose(0, 1).reshape(12, 6))
            elif name == "rows":
                self.qkv.data[2:6, 1:4] = weight[3:7, 2:5]
            elif name == "replaced":
                self.bias = nn.Parameter(weight)
            elif name != "unused":
                raise KeyError(name)


def traced(model, *sources):
    return trace(model, model.load_weights, [Source(n, s, torch.bfloat16) for n, s in sources])


def test_fused_parameters_are_followed_box_by_box():
    seen = traced(Fused(), ("k", (4, 6)), ("q", (4, 6)))
    whole = View(0, (4, 6), (6, 1))
    assert seen.copies == [
        Copy("qkv", Box((4, 0), (4, 6)), frozenset("k"), whole, View(24, (4, 6), (6, 1))),
        Copy("qkv", Box((0, 0), (4, 6)), frozenset("q"), whole, View(0, (4, 6), (6, 1))),
    ]
    assert not seen.computed


class Seen(TorchDispatchMode):
    """What a mode is told of."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.last = str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fails", [False, True])
def test_views_are_hidden_from_modes_only_while_a_loader_runs(fails):
    def views(tensor):
        yield tensor[1:]
        yield tensor.data
        yield tensor[1]
        yield tensor.t()
        yield tensor.transpose(0, 1)
        yield tensor.permute(1, 0)
        yield tensor.unsqueeze(0)
        yield tensor.view(-1)
        yield tensor.as_strided((2,), (1,))
        yield tensor.narrow(1, 0, 2)
        yield from tensor.chunk(2)
        yield from tensor.split(2)
        yield from tensor.unbind(0)

    told = []

    class Viewing(Fused):
        def load_weights(self, weights):
            with Seen() as mode:
                for number, _ in enumerate(views(next(weights)[1])):
                    told.append((number, mode.__dict__.pop("last", None)))
            if fails:
                raise ValueError

    assert bool(traced(Viewing(), ("q", (4, 6))).failed) == fails
    # narrow goes on as itself once slices are hidden
    assert {name for _, name in told} <= {None, "aten.narrow.default"}
    with Seen() as mode:
        after = {mode.last for _ in views(torch.zeros(4, 6))}
    assert {"aten.slice.Tensor", "aten.detach.default", "aten.t.default", "aten.unbind.int"} <= after
    assert "data" not in vars(torch.Tensor)


def test_views_are_not_hidden_from_a_models_own_kind_of_tensor():
    class Telling(torch.Tensor):
        told: ClassVar[list[str]] = []

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            cls.told.append(str(func))
            return func(*(torch.zeros(4, 6) if isinstance(a, Telling) else a for a in args), **(kwargs or {}))

    class Viewing(Fused):
        def __init__(self) -> None:
            super().__init__()
            self.own = torch.Tensor._make_wrapper_subclass(Telling, (4, 6))
            self.register_buffer("table_of_its_own", self.own)

        def load_weights(self, weights):
            super().load_weights(weights)
            self.own[1:].unbind()

    seen = traced(Viewing(), ("q", (4, 6)))
    assert seen.failed is None
    assert {copy.target for copy in seen.copies} == {"qkv"}
    assert "aten.slice.Tensor" in Telling.told


def test_a_loader_that_reads_or_changes_parameters_is_known():
    class Doubling(Fused):
        def load_weights(self, weights):
            super().load_weights(weights)
            self.bias.data.mul_(2)

    class Summing(Fused):
        def load_weights(self, weights):
            super().load_weights(weights)
            self.total = self.qkv.data.sum()

    class Doubled(Fused):
        def load_weights(self, weights):
            super().load_weights(weights)
            self.bias.data.copy_(self.qkv.data[:4, 0] * 2)

    for model, computed in ((Doubling(), {"bias"}), (Summing(), {"qkv"}), (Doubled(), {"qkv", "bias"})):
        assert traced(model, ("q", (4, 6))).computed == computed


def test_a_loader_that_looks_at_what_the_model_brings_does_not_compute():
    """As vLLM's looks up in a table of the layer which experts are this rank's."""

    class Mapped(Fused):
        def __init__(self):
            super().__init__()
            self.register_buffer("expert_map", torch.tensor([-1, 0]))

        def load_weights(self, weights):
            super().load_weights((name, weight) for name, weight in weights if self.expert_map[int(name == "q")] >= 0)

    seen = traced(Mapped(), ("q", (4, 6)), ("k", (4, 6)))
    assert [copy.src_name for copy in seen.copies] == ["q"]
    assert not seen.computed


def test_what_a_loader_leaves_to_threads_is_followed():
    class Threaded(Fused):
        def load_weights(self, weights):
            with ThreadPoolExecutor() as pool:
                for done in [pool.submit(super(Threaded, self).load_weights, [pair]) for pair in weights]:
                    done.result()

    seen = traced(Threaded(), ("q", (4, 6)), ("k", (4, 6)))
    assert [(copy.src_name, copy.view) for copy in seen.copies] == [(name, View(0, (4, 6), (6, 1))) for name in "qk"]
    assert traced(Threaded(), ("q", (4, 6)), ("what", (4, 6))).failed[0] == "what"


def test_the_model_is_as_it_was():
    model = Fused()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    traced(model, ("q", (4, 6)), ("negated", (4,)), ("permuted", (12, 6)), ("rows", (12, 6)))
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name])
        assert not tensor.is_meta


def test_part_of_a_tensor_into_part_of_a_parameter():
    (copy,) = traced(Fused(), ("rows", (12, 6))).copies
    assert copy.box == ((2, 1), (4, 3))
    assert copy.view == View(3 * 6 + 2, (4, 3), (6, 1))


def test_what_is_computed_keeps_its_name_and_loses_its_place():
    (negated,) = traced(Fused(), ("negated", (4,))).copies
    assert (negated.src_name, negated.view) == ("negated", None)


def test_what_a_loader_puts_in_another_order_is_followed_axis_by_axis():
    (permuted,) = traced(Fused(), ("permuted", (12, 6))).copies
    assert permuted.box == ((0, 0), (12, 6))
    assert permuted.view == View(0, (6, 2, 6), (6, 36, 1))
    assert permuted.into == View(0, (6, 2, 6), (12, 6, 1))


class Joining(Fused):
    """Puts what it is given together, by `join`, before it writes that into all of a parameter."""

    def __init__(self, join) -> None:
        super().__init__()
        self.join = join

    def load_weights(self, weights):
        self.qkv.data.copy_(self.join([weight for _, weight in weights]))


@pytest.mark.parametrize(
    ("join", "shapes", "found"),
    [
        (torch.cat, [(4, 6), (8, 6)], [("a", (0, 0), (4, 6), 0), ("b", (4, 0), (8, 6), 0)]),
        (
            lambda given: torch.cat(given, dim=-1),
            [(12, 2), (12, 4)],
            [("a", (0, 0), (12, 2), 0), ("b", (0, 2), (12, 4), 0)],
        ),
        (
            lambda given: torch.stack(given).view(12, 6),
            [(6, 6), (6, 6)],
            [("a", (0, 0), (6, 6), 0), ("b", (6, 0), (6, 6), 0)],
        ),
        # a rank's rows, of which some are of one and some of the other; also as tensors of their own
        (lambda given: torch.cat(given)[2:14], [(8, 6), (8, 6)], [("a", (0, 0), (6, 6), 12), ("b", (6, 0), (6, 6), 0)]),
        (
            lambda given: torch.cat(given)[2:14].to("cpu", copy=True),
            [(8, 6), (8, 6)],
            [("a", (0, 0), (6, 6), 12), ("b", (6, 0), (6, 6), 0)],
        ),
        (
            lambda given: torch.cat([torch.cat(given[:2]), given[2]]),
            [(4, 6), (4, 6), (4, 6)],
            [("a", (0, 0), (4, 6), 0), ("b", (4, 0), (4, 6), 0), ("c", (8, 0), (4, 6), 0)],
        ),
        (
            lambda given: torch.cat([given[0][4:], given[0][:4], given[0].new_empty(0)]),
            [(12, 6)],
            [("a", (0, 0), (8, 6), 24), ("a", (8, 0), (4, 6), 0)],
        ),
    ],
)
def test_what_a_loader_puts_together_is_followed_part_by_part(join, shapes, found):
    seen = traced(Joining(join), *zip("abc", shapes, strict=False))
    assert [(copy.src_name, *copy.box, copy.view and copy.view.offset) for copy in seen.copies] == found
    assert all(math.prod(copy.view.size) == copy.box.numel for copy in seen.copies)


@pytest.mark.parametrize(
    "join",
    [
        lambda given: torch.cat([given[0], -given[1]]),
        lambda given: torch.cat([given[0], torch.zeros(6, 6, dtype=torch.bfloat16, device="meta")]),
        lambda given: torch.cat([given[0], given[1].float()]),
        lambda given: torch.cat(given).mul_(2),
    ],
)
def test_what_is_put_together_with_something_computed_is_not_followed(join):
    (copy,) = traced(Joining(join), ("a", (6, 6)), ("b", (6, 6))).copies
    assert (copy.src_name, copy.box, copy.view) == ("a", ((0, 0), (12, 6)), None)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight[2:].zero_(),
        lambda weight: weight[2:].fill_(1),
        lambda weight: weight[2:].copy_(torch.ones(2, 6)),
        lambda weight: weight.mul_(2),
    ],
)
def test_a_tensor_that_the_loader_changes_is_not_followed(change):
    class Changing(Fused):
        def load_weights(self, weights):
            def changed():
                for name, weight in weights:
                    change(weight)
                    yield name, weight

            super().load_weights(changed())

    (copy,) = traced(Changing(), ("q", (4, 6))).copies
    assert (copy.sources, copy.view) == (frozenset("q"), None)


def test_padding_is_a_constant_and_values_that_are_asked_for_are_noted():
    seen = traced(Fused(), ("table", (5, 6)), ("factor", (1,)))
    table, padding, factor = seen.copies
    assert (table.box, table.sources) == (((0, 0), (5, 6)), frozenset(["table"]))
    assert (padding.box, padding.sources) == (((5, 0), (3, 6)), frozenset())
    assert factor.target == "factor"
    assert seen.used == {"factor"}


def test_bytes_are_not_counted_as_elements():
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Parameter(torch.empty(4, 8, dtype=torch.bfloat16))
            self.raw = nn.Parameter(torch.empty(4, 16, dtype=torch.uint8), requires_grad=False)

        def load_weights(self, weights):
            for name, weight in weights:
                if name == "wide":  # as many bytes as the parameter has elements
                    self.wide.data[:2].view(torch.uint8).copy_(weight.view(torch.uint8))
                else:
                    self.raw.data.copy_(weight.view(torch.uint8).clone())

    seen = traced(Bytes(), ("wide", (2, 8)), ("raw", (4, 8)))
    assert seen.opaque == {"wide": "wide"}
    assert [(copy.target, copy.sources, copy.view) for copy in seen.copies] == [("raw", frozenset({"raw"}), None)]


def test_a_table_without_padding_has_no_empty_write():
    seen = traced(Fused(), ("table", (8, 6)))
    assert [copy.box.size for copy in seen.copies] == [(8, 6)]
    assert not seen.opaque


def test_a_refused_tensor_is_named_and_what_nobody_takes_is_not():
    seen = traced(Fused(), ("unused", (3,)), ("strange", (2, 2)), ("q", (4, 6)))
    assert seen.failed is not None
    assert seen.failed[0] == "strange"
    assert isinstance(seen.failed[1], KeyError)
    assert seen.copies == []


def test_a_loader_that_replaces_parameters_is_an_error():
    with pytest.raises(CoverageError, match="replaces bias instead of writing into it"):
        traced(Fused(), ("replaced", (4,)))


def test_a_parameter_that_the_loader_makes_is_the_models():
    class Late(Fused):
        def load_weights(self, weights):
            for name, weight in weights:
                if name == "late":
                    self.late = nn.Parameter(torch.empty(4))
                    self.late.data[1:].copy_(weight)
                    self.late.data[:1].fill_(0)
                else:
                    super().load_weights([(name, weight)])

    seen = traced(Late(), ("late", (3,)), ("q", (4, 6)))
    late, padding = seen.by_target["late"]
    assert (late.box, late.src_name) == (((1,), (3,)), "late")
    assert (padding.box, padding.sources) == (((0,), (1,)), frozenset())
    assert seen.computed == {"late"}  # it makes another one each time
