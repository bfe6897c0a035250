"""Batches of an accelerator, on a CPU: one after another, but the joining and the arithmetic are those of a GPU."""

from __future__ import annotations

import importlib
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import octavo
from helpers import same_bytes
from helpers.engine import Model, Shape, checkpoint
from octavo.errors import UpdateError, WeightError
from octavo.numerics import schemes
from octavo.running import modules
from octavo.session.session import Session

SHAPE = Shape(hidden=256, inner=320, experts=6)
MIB = 1 << 20


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of boxes that were quantized together, each time."""
    module, seen = importlib.import_module("octavo.session.quantize.batches"), []
    original = module._quantize

    def counting(tasks: list[Tensor], scheme: schemes.Scheme) -> Tensor:
        seen.append(len(tasks))
        return original(tasks, scheme)

    monkeypatch.setattr(module, "_quantize", counting)
    monkeypatch.setattr(
        importlib.import_module("octavo.session.quantize.quantizer"), "has_batches", lambda device: True
    )
    return seen


def loaded(scheme: str, pairs: list[tuple[str, Tensor]], **options: bool | int) -> tuple[Model, Session]:
    with torch.device("meta"):
        model = Model(SHAPE, moe=True)
    session = Session(model, scheme, "cpu", **options)
    with session:
        model.load_weights(pairs)
    return model, session


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.data.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "layer"])
@pytest.mark.parametrize("staging_bytes", [MIB, 256 * MIB])
@pytest.mark.parametrize("scheme", schemes.SCHEMES)
def test_batches_give_the_bytes_of_one_box_after_another(
    scheme: str, staging_bytes: int, direct: bool, request: pytest.FixtureRequest
) -> None:
    pairs = list(checkpoint(SHAPE, moe=True).items())
    doubled = random.Random(0).sample([(name, tensor * 2) for name, tensor in pairs], len(pairs))
    expected = [state(loaded(scheme, given)[0]) for given in (pairs, doubled)]
    seen = request.getfixturevalue("batches")
    model, session = loaded(scheme, pairs, direct=direct, staging_bytes=staging_bytes)
    found = [state(model)]
    with session:
        model.load_weights(iter(doubled))
    found.append(state(model))
    for mine, other in zip(found, expected, strict=True):
        assert [name for name in mine if not same_bytes(mine[name], other[name])] == []
    assert seen
    assert session._quantizer._batches == {}  # its memory went with the session's use


def test_what_lies_regularly_is_joined(batches: list[int]) -> None:
    """Gate and up of all experts are few boxes, however many tensors they come from."""
    pairs = list(checkpoint(SHAPE, moe=True).items())
    _, session = loaded("fp8_channel", pairs)
    quantized = [event for event in session.events if event.kind == "quantize"]
    assert sum(batches) < len(quantized) / 2


def test_an_iterator_may_use_memory_again(batches: list[int]) -> None:
    pairs = checkpoint(SHAPE, moe=True)
    expected = state(loaded("fp8_block", list(pairs.items()))[0])

    def reusing() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in pairs.items():
            mine = tensor.clone()
            yield name, mine
            mine.fill_(torch.nan)

    found = state(loaded("fp8_block", reusing())[0])  # type: ignore[arg-type]
    assert [name for name in found if not same_bytes(found[name], expected[name])] == []
    assert batches


class Copies(TorchDispatchMode):
    """The number of tensors of each copy of many."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("source", ["list", "dict", "iterator"])
def test_an_update_copies_together_only_what_stays_as_it_is(source: str, batches: list[int]) -> None:
    widths, generator = (32, 64, 48, 96), torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(*shape, bias=False) for shape in itertools.pairwise(widths)))
    names = [f"{number}.weight" for number in range(len(model))]
    with Session(model, "fp8_channel", "cpu") as session:
        session.load((name, torch.ones(linear.weight.shape)) for name, linear in zip(names, model, strict=True))
    # as memory of another order
    news = {
        name: torch.randn(linear.in_features, linear.out_features, generator=generator).T
        for name, linear in zip(names, model, strict=True)
    }

    def reusing() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in news.items():
            mine = tensor.clone()
            yield name, mine
            mine.fill_(torch.nan)

    with Copies() as copies:
        octavo.update(model, {"list": list(news.items()), "dict": news, "iterator": reusing()}[source])
    assert sum(copies.sizes) == len(names)
    assert max(copies.sizes) == (1 if source == "iterator" else len(names))
    for name, new in news.items():
        q, scale = schemes.quantize(new, "fp8_channel")
        assert same_bytes(model.get_parameter(name).data, q)
        assert same_bytes(model.get_parameter(modules.scale_name(name)).data, scale)


def linears(count: int, rows: int = 64) -> nn.Module:
    """Loaded with ones; ``plain`` is not quantized."""
    with torch.device("meta"):
        model = nn.ModuleDict({f"n{number}": nn.Linear(32, rows, bias=False) for number in range(count)})
        model.register_parameter("plain", nn.Parameter(torch.empty(rows, 32)))
    with Session(model, "fp8_channel", "cpu") as session:
        session.load([(name, torch.ones(rows, 32)) for name, _ in model.named_parameters()])
    return model


def holds(model: nn.Module, name: str, values: Tensor) -> bool:
    q, scale = schemes.quantize(values, "fp8_channel")
    found = model.get_parameter(name).data, model.get_parameter(modules.scale_name(name)).data
    return same_bytes(found[0], q) and same_bytes(found[1], scale)


def test_values_that_an_update_is_about_to_overwrite_are_taken_before(batches: list[int]) -> None:
    model = linears(1)
    old, new = torch.randn(2, 64, 32)
    octavo.update(model, [("plain", old)])
    octavo.update(model, [("n0.weight", model.plain.data.t().t()), ("plain", new)])
    assert torch.equal(model.plain.data, new)
    assert holds(model, "n0.weight", old)


class Lazy(Sequence[Any]):
    """A pair that is read when it is taken apart, into memory of all."""

    def __init__(self, name: str, values: Tensor, memory: Tensor) -> None:
        self._name, self._values, self._memory = name, values, memory

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: Any) -> Any:
        return self._memory.copy_(self._values) if index else self._name

    def __iter__(self) -> Iterator[Any]:
        return iter((self[0], self[1]))


def test_pairs_in_a_list_may_use_memory_again_when_they_are_taken_apart(batches: list[int]) -> None:
    model, values, memory = linears(3), torch.randn(3, 64, 32), torch.empty(64, 32)
    lazy: list[Any] = [Lazy(f"n{number}.weight", value, memory) for number, value in enumerate(values)]
    octavo.update(model, [("n0.weight", values[0]), *lazy[1:]])
    assert [number for number, value in enumerate(values) if not holds(model, f"n{number}.weight", value)] == []


class Exhausted(TorchDispatchMode):
    """An operation that runs out of memory, the second time."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self._seen = name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._seen += str(func.overloadpacket) == self._name
        if self._seen == 2:
            raise torch.OutOfMemoryError
        return func(*args, **(kwargs or {}))


def test_what_an_error_leaves_half_written_is_not_called_old(batches: list[int]) -> None:
    """Of a weight larger than a batch, the first part is new already."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(256, 700, bias=False))
    with Session(model, "fp8_channel", "cpu") as session:
        session.load([("0.weight", torch.ones(700, 256))])
    before = state(model)
    with Exhausted("aten._foreach_copy_"), pytest.raises(UpdateError) as caught:
        octavo.update(model, iter([("0.weight", torch.randn(700, 256))]), staging_bytes=MIB)
    after = state(model)
    assert not all(same_bytes(after[name], before[name]) for name in before)
    assert caught.value.torn == ("0",)


@pytest.mark.parametrize("operation", ["aten._foreach_copy_", "aten.bitwise_and"])
def test_nothing_is_quantized_of_what_could_not_be_copied(operation: str, batches: list[int]) -> None:
    rows = MIB // 3 // 32 // 4 // 3  # three weights fit a batch
    model, values = linears(4, rows), torch.randn(4, rows, 32)
    pairs = [(f"n{number}.weight", value) for number, value in enumerate(values)]
    with Exhausted(operation), pytest.raises(UpdateError) as caught:
        octavo.update(model, pairs, staging_bytes=MIB)
    holding = {name.removesuffix(".weight"): holds(model, name, value) for name, value in pairs}
    assert all(holding[name] for name in caught.value.new)
    assert not any(holding[name] for name in caught.value.old if name in holding)
    for number in range(4):  # new or old, and nothing else
        assert holding[f"n{number}"] or holds(model, f"n{number}.weight", torch.ones(rows, 32))
    octavo.update(model, pairs)
    assert all(holds(model, name, value) for name, value in pairs)


def test_what_a_loader_makes_is_not_kept_for_a_batch(batches: list[int]) -> None:
    """Even from a list, whose own tensors stay."""
    weight, made = torch.randn(96, 32), []

    class Fused(nn.Sequential):
        def load_weights(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
            for number, (_, tensor) in enumerate(pairs):
                assert all(reference.expired() for reference in made)
                doubled = tensor * 2
                made.append(StorageWeakRef(doubled.untyped_storage()))
                self[0].weight.data[32 * number : 32 * number + 32].copy_(doubled)
                del doubled

    with torch.device("meta"):
        model = Fused(nn.Linear(32, 96, bias=False))
    with Session(model, "fp8_channel", "cpu"):
        model.load_weights([("part", part) for part in weight.split(32)])
    assert len(made) == 3
    assert same_bytes(model[0].weight.data, schemes.quantize(weight * 2, "fp8_channel")[0])


def test_what_is_not_finite_is_named_at_the_end(batches: list[int]) -> None:
    pairs = checkpoint(SHAPE, moe=True)
    name = next(name for name in pairs if "experts.3.up_proj" in name)
    for scheme in schemes.SCHEMES:
        bad = pairs[name].clone()
        bad[3, 5] = torch.inf
        with pytest.raises(WeightError, match=rf"{name}: holds values that are not finite"):
            loaded(scheme, list({**pairs, name: bad}.items()))
