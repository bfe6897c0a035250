"""Tensors by other names, or fused, of a toy loader: known by where it puts them, exactly or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from octavo.adapters.engine.renaming import parts_of
from octavo.elements.dry_run import Source, trace

SHAPES = {"gate": (6, 4), "up": (6, 4), "down": (4, 6), "norm": (4,), **{f"expert.{n}": (2, 4) for n in range(4)}}


class Model(nn.Module):
    """gate and up in one parameter, four experts in a stack; this rank has half of the rows, and of down's columns."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(6, 4, device="meta"))
        self.down = nn.Parameter(torch.empty(4, 3, device="meta"))
        self.norm = nn.Parameter(torch.empty(4, device="meta"))
        self.experts = nn.Parameter(torch.empty(3, 2, 4, device="meta"))

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            match name.split("."):
                case ["gate"]:
                    self.gate_up[:3].copy_(weight[3:])
                case ["up"]:
                    self.gate_up[3:].copy_(weight[3:])
                case ["gate_up"]:
                    self.load([("gate", weight[:6]), ("up", weight[6:])])
                case ["down"] | ["model", "down"]:
                    self.down.copy_(weight[:, 3:])
                case ["norm"]:
                    self.norm.copy_(weight)
                case ["flipped"]:
                    self.norm.copy_(weight.flip(0))
                case ["expert", number]:
                    if int(number) < 3:
                        self.experts[int(number)].copy_(weight)
                case ["experts", "transposed"]:
                    self.experts.copy_(weight.transpose(1, 2))
                case ["experts"]:
                    self.experts.copy_(weight[:3])
                case ["two", "experts"]:
                    self.experts[:2].copy_(weight)
                case ["cropped", "down"]:
                    self.down.copy_(weight[:4, 3:])
                case ["cropped", "experts"]:
                    self.experts.copy_(weight[:, :2])
                case ["half"]:
                    self.experts[0, :1].copy_(weight)


@pytest.mark.parametrize(
    ("name", "shape", "held"),
    [
        ("model.down", (4, 6), {"down": lambda t: t}),
        ("gate_up", (12, 4), {"gate": lambda t: t[:6], "up": lambda t: t[6:]}),
        ("experts", (3, 2, 4), {f"expert.{n}": lambda t, n=n: t[n] for n in range(3)}),
        ("experts.transposed", (3, 4, 2), {f"expert.{n}": lambda t, n=n: t[n].T for n in range(3)}),
        ("experts", (4, 2, 4), {f"expert.{n}": lambda t, n=n: t[n] for n in range(3)}),
        ("experts", (5, 2, 4), None),
        ("two.experts", (2, 2, 4), {f"expert.{n}": lambda t, n=n: t[n] for n in range(2)}),
        ("cropped.down", (5, 6), None),
        ("cropped.experts", (3, 3, 4), None),
        ("half", (1, 4), None),
        ("flipped", (4,), None),
        ("unknown", (4,), None),
    ],
)
def test_what_a_tensor_holds(
    name: str, shape: tuple[int, ...], held: dict[str, Callable[[Tensor], Tensor]] | None
) -> None:
    model = Model()
    known = trace(model, model.load, [Source(*each, torch.bfloat16) for each in SHAPES.items()]).by_source
    copies = trace(model, model.load, [Source(name, shape, torch.bfloat16)]).by_source.get(name, [])
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = parts_of(copies, tuple(tensor.shape), known, SHAPES, lambda _: 4)
    if held is None:
        assert parts is None
        return
    assert parts is not None
    found = {part.name: tensor.as_strided(part.shape, part.strides, part.offset) for part in parts}
    assert list(found) == list(held)
    for part, view in held.items():
        assert torch.equal(found[part], view(tensor)), part
