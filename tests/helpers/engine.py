"""Layers and models that load themselves as vLLM's do: partitions, fused layers, experts behind a map.

Every parameter has a ``weight_loader(parameter, loaded, ...)`` that narrows and copies; `Model.load_weights` walks over
``(name, tensor)`` pairs and finds the parameter and shard that a name belongs to. All ranks run in one process: a rank
is a number that layers are made with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rank:
    """One of ``size`` tensor-parallel processes."""

    number: int = 0
    size: int = 1

    def cut(self, length: int) -> tuple[int, int]:
        """(start, length) of this rank's partition."""
        each = length // self.size
        return self.number * each, each


@dataclass(frozen=True)
class Shape:
    """What the models below are made of."""

    hidden: int = 256
    inner: int = 320
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    experts: int = 4
    layers: int = 2
    vocab: int = 96


def _parameter(*shape: int, dtype: torch.dtype, loader: Callable[..., None]) -> nn.Parameter:
    parameter = nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
    parameter.weight_loader = loader  # type: ignore[attr-defined]
    return parameter


def plain_loader(parameter: Tensor, loaded: Tensor) -> None:
    assert parameter.shape == loaded.shape
    parameter.data.copy_(loaded)


class ColumnParallel(nn.Module):
    """weight [out / ranks, in]; ``outs`` are the widths of the tensors that are fused into it."""

    def __init__(
        self, inputs: int, outs: Mapping[str, int], rank: Rank, dtype: torch.dtype, bias: bool = False
    ) -> None:
        super().__init__()
        self.outs, self.rank = dict(outs), rank
        total = sum(rank.cut(n)[1] for n in outs.values())
        self.weight = _parameter(total, inputs, dtype=dtype, loader=self.weight_loader)
        if bias:
            self.bias = _parameter(total, dtype=dtype, loader=self.weight_loader)

    def weight_loader(self, parameter: Tensor, loaded: Tensor, shard: str | None = None) -> None:
        data = parameter.data
        if shard is not None:
            before = list(self.outs)[: list(self.outs).index(shard)]
            offset = sum(self.rank.cut(self.outs[name])[1] for name in before)
            data = data.narrow(0, offset, self.rank.cut(self.outs[shard])[1])
        start, length = self.rank.cut(loaded.shape[0])
        loaded = loaded.narrow(0, start, length)
        assert data.shape == loaded.shape
        data.copy_(loaded)


class QKV(ColumnParallel):
    """Heads cut over ranks; where there are fewer key heads than ranks, ranks share them."""

    def __init__(self, shape: Shape, rank: Rank, dtype: torch.dtype) -> None:
        kv_rank = (
            rank if shape.kv_heads >= rank.size else Rank(rank.number * shape.kv_heads // rank.size, shape.kv_heads)
        )
        self.kv_rank = kv_rank
        nn.Module.__init__(self)
        self.rank = rank
        self.widths = {
            "q": shape.heads * shape.head_dim // rank.size,
            "k": shape.kv_heads * shape.head_dim // kv_rank.size,
            "v": shape.kv_heads * shape.head_dim // kv_rank.size,
        }
        total = sum(self.widths.values())
        self.weight = _parameter(total, shape.hidden, dtype=dtype, loader=self.weight_loader)
        self.bias = _parameter(total, dtype=dtype, loader=self.weight_loader)

    def weight_loader(self, parameter: Tensor, loaded: Tensor, shard: str | None = None) -> None:
        assert shard is not None
        names = list(self.widths)
        offset = sum(self.widths[name] for name in names[: names.index(shard)])
        data = parameter.data.narrow(0, offset, self.widths[shard])
        start = (self.rank if shard == "q" else self.kv_rank).number * self.widths[shard]
        data.copy_(loaded.narrow(0, start, self.widths[shard]))


class RowParallel(nn.Module):
    """weight [out, in / ranks]"""

    def __init__(self, inputs: int, outputs: int, rank: Rank, dtype: torch.dtype) -> None:
        super().__init__()
        self.rank = rank
        self.weight = _parameter(outputs, rank.cut(inputs)[1], dtype=dtype, loader=self.weight_loader)

    def weight_loader(self, parameter: Tensor, loaded: Tensor) -> None:
        start, length = self.rank.cut(loaded.shape[1])
        parameter.data.copy_(loaded.narrow(1, start, length))


class Experts(nn.Module):
    """w13_weight [local experts, 2 x inner / ranks, hidden], w2_weight [local experts, hidden, inner / ranks].

    With expert parallelism a rank has whole experts, and a map from their global number to its own, or to -1.
    """

    def __init__(self, shape: Shape, rank: Rank, dtype: torch.dtype, expert_parallel: bool = False) -> None:
        super().__init__()
        self.rank = Rank() if expert_parallel else rank
        first, count = rank.cut(shape.experts) if expert_parallel else (0, shape.experts)
        self.map = {first + local: local for local in range(count)}
        inner = self.rank.cut(shape.inner)[1]
        self.w13_weight = _parameter(count, 2 * inner, shape.hidden, dtype=dtype, loader=self.weight_loader)
        self.w2_weight = _parameter(count, shape.hidden, inner, dtype=dtype, loader=self.weight_loader)

    def weight_loader(self, parameter: Tensor, loaded: Tensor, shard: str, expert: int) -> None:
        local = self.map.get(expert, -1)
        if local == -1:
            return
        data = parameter.data[local]
        if shard == "w2":
            start, length = self.rank.cut(loaded.shape[1])
            data.copy_(loaded.narrow(1, start, length))
            return
        half = data.shape[0] // 2
        start, length = self.rank.cut(loaded.shape[0])
        data = data.narrow(0, 0 if shard == "w1" else half, half)
        data.copy_(loaded.narrow(0, start, length))


class Embedding(nn.Module):
    """weight [vocabulary / ranks, padded; hidden]: what no checkpoint fills is set to zero by the loader."""

    def __init__(self, shape: Shape, rank: Rank, dtype: torch.dtype, pad_to: int = 64) -> None:
        super().__init__()
        self.rank, self.rows = rank, rank.cut(shape.vocab)[1]
        padded = -(-self.rows // pad_to) * pad_to
        self.weight = _parameter(padded, shape.hidden, dtype=dtype, loader=self.weight_loader)

    def weight_loader(self, parameter: Tensor, loaded: Tensor) -> None:
        start, length = self.rank.cut(loaded.shape[0])
        parameter[:length].data.copy_(loaded.narrow(0, start, length))
        parameter[length:].data.fill_(0)


class Norm(nn.Module):
    def __init__(self, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden, dtype=dtype), requires_grad=False)


class Gate(nn.Module):
    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(shape.experts, shape.hidden, dtype=dtype, loader=plain_loader)


class Attention(nn.Module):
    def __init__(self, shape: Shape, rank: Rank, dtype: torch.dtype) -> None:
        super().__init__()
        self.qkv_proj = QKV(shape, rank, dtype)
        self.o_proj = RowParallel(shape.heads * shape.head_dim, shape.hidden, rank, dtype)


class Mlp(nn.Module):
    def __init__(self, shape: Shape, rank: Rank, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = ColumnParallel(shape.hidden, {"gate": shape.inner, "up": shape.inner}, rank, dtype)
        self.down_proj = RowParallel(shape.inner, shape.hidden, rank, dtype)


class Moe(nn.Module):
    def __init__(self, shape: Shape, rank: Rank, dtype: torch.dtype, expert_parallel: bool) -> None:
        super().__init__()
        self.gate = Gate(shape, dtype)
        self.experts = Experts(shape, rank, dtype, expert_parallel)


class Block(nn.Module):
    def __init__(self, shape: Shape, rank: Rank, dtype: torch.dtype, moe: bool, expert_parallel: bool) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, dtype)
        self.self_attn = Attention(shape, rank, dtype)
        self.mlp = Moe(shape, rank, dtype, expert_parallel) if moe else Mlp(shape, rank, dtype)


class Model(nn.Module):
    """Blocks with fused attention, and either a merged gate and up or a stack of experts."""

    fused = (
        ("qkv_proj", "q_proj", "q"),
        ("qkv_proj", "k_proj", "k"),
        ("qkv_proj", "v_proj", "v"),
        ("gate_up_proj", "gate_proj", "gate"),
        ("gate_up_proj", "up_proj", "up"),
    )

    def __init__(
        self,
        shape: Shape | None = None,
        rank: Rank | None = None,
        *,
        moe: bool = False,
        expert_parallel: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.shape, rank = shape or Shape(), rank or Rank()
        self.moe = moe
        self.embed_tokens = Embedding(self.shape, rank, dtype)
        self.layers = nn.ModuleList(
            Block(self.shape, rank, dtype, moe, expert_parallel) for _ in range(self.shape.layers)
        )
        self.norm = Norm(self.shape.hidden, dtype)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        parameters = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            target, arguments = self._target(name)
            parameter = parameters[target]
            loader = getattr(parameter, "weight_loader", plain_loader)
            loader(parameter, tensor, *arguments)
            loaded.add(target)
        return loaded

    def _target(self, name: str) -> tuple[str, tuple[Any, ...]]:
        if ".experts." in name:
            stem, _, rest = name.partition(".experts.")
            number, part, _ = rest.split(".")
            shard = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[part]
            stack = "w2_weight" if shard == "w2" else "w13_weight"
            return f"{stem}.experts.{stack}", (shard, int(number))
        for fused, part, shard in self.fused:
            if f".{part}." in name:
                return name.replace(part, fused), (shard,)
        return name, ()


def checkpoint_shapes(shape: Shape, *, moe: bool = False) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint."""
    yield "embed_tokens.weight", (shape.vocab, shape.hidden)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for number in range(shape.layers):
        at = f"layers.{number}."
        yield at + "input_layernorm.weight", (shape.hidden,)
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            yield f"{at}self_attn.{part}_proj.weight", (rows, shape.hidden)
            yield f"{at}self_attn.{part}_proj.bias", (rows,)
        yield at + "self_attn.o_proj.weight", (shape.hidden, q)
        if moe:
            yield at + "mlp.gate.weight", (shape.experts, shape.hidden)
        for prefix in [f"experts.{i}." for i in range(shape.experts)] if moe else [""]:
            yield f"{at}mlp.{prefix}gate_proj.weight", (shape.inner, shape.hidden)
            yield f"{at}mlp.{prefix}up_proj.weight", (shape.inner, shape.hidden)
            yield f"{at}mlp.{prefix}down_proj.weight", (shape.hidden, shape.inner)
    yield "norm.weight", (shape.hidden,)


def checkpoint(
    shape: Shape | None = None, *, moe: bool = False, seed: int = 0, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Random weights under the names of a checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    found = checkpoint_shapes(shape or Shape(), moe=moe)
    return {name: (torch.randn(size, generator=generator) * 0.05).to(dtype) for name, size in found}


def fused_parts(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(parameter, rows of each tensor that was fused into it) of what octavo quantizes."""
    for name, module in model.named_modules():
        if isinstance(module, QKV):
            yield f"{name}.weight", tuple(module.widths.values())
        elif isinstance(module, ColumnParallel):
            yield f"{name}.weight", tuple(module.rank.cut(n)[1] for n in module.outs.values())
        elif isinstance(module, RowParallel):
            yield f"{name}.weight", (module.weight.shape[0],)
        elif isinstance(module, Experts):
            inner = module.w13_weight.shape[1] // 2
            yield f"{name}.w13_weight", (inner, inner)
            yield f"{name}.w2_weight", (module.w2_weight.shape[1],)
