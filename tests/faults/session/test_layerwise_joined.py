"""Tensors that a loader stages, joins or collects: each keeps its own scales, or the load fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _layerwise import Pairs, assert_channel, linears, staged, weights
from torch import Tensor

from helpers import same_bytes
from helpers.layerwise import assert_quantized, one_linear
from octavo.errors import CoverageError, LoaderError
from octavo.numerics import schemes
from octavo.session import Session


def through_staging(model: Any, session: Session, pairs: Pairs) -> None:
    """Each tensor by way of memory that the loader uses again."""
    staging = torch.empty(64, 64, dtype=torch.bfloat16)
    for name, tensor in session.pairs(pairs):
        staging.copy_(tensor)
        model["a"].weight.data[slice(0, 64) if name == "q" else slice(64, 128)].copy_(staging)


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_block"])
def test_staging_memory_that_is_used_again_keeps_tensors_apart(scheme: str, direct: bool) -> None:
    q, k = weights(0)
    model = one_linear(128)
    with Session(model, scheme, direct=direct) as session:
        through_staging(model, session, [("q", q), ("k", k)])
    assert_quantized(model["a"], torch.cat([q, k]), scheme, [64, 64])
    model = one_linear(128)
    with pytest.raises(CoverageError, match="two tensors|Two tensors|written twice"), Session(model, scheme) as session:  # noqa: RUF043
        through_staging(model, session, [("q", q), ("k", k), ("k", k * 3)])


def test_staging_in_a_buffer_of_the_model() -> None:
    weight = weights(0)[0]
    model = linears("a")
    model["a"].register_buffer("staging", torch.zeros(32, 64, dtype=torch.bfloat16))
    with Session(model) as session:
        for _, tensor in session.pairs([("w", weight)]):
            for rows in (slice(0, 32), slice(32, 64)):
                model["a"].staging.copy_(tensor[rows])
                model["a"].weight.data[rows].copy_(model["a"].staging)
    assert_channel(model["a"], weight)


@pytest.mark.parametrize(
    "join", [lambda q, k: torch.stack([q, k]).flatten(0, 1), lambda q, k: torch.cat([q, q, k])[64:]]
)
def test_tensors_that_are_joined_and_seen_otherwise_keep_their_scales(join: Callable[..., Tensor]) -> None:
    q, k = weights(0)
    model = one_linear(128)
    with Session(model, "fp8_tensor") as session:
        pairs = dict(session.pairs([("q", q), ("k", k)]))
        model["a"].weight.data.copy_(join(pairs["q"], pairs["k"]))
    assert model["a"].weight_scale.numel() == 2


def by_slice(target: Tensor, start: int, tensor: Tensor) -> None:
    target[start : start + 64].copy_(tensor)


def by_index(target: Tensor, start: int, tensor: Tensor) -> None:
    target[torch.arange(start, start + 64)] = tensor


@pytest.mark.parametrize(("write", "shared"), [(by_slice, True), (by_index, False)], ids=["storage", "index"])
def test_tensors_that_a_loader_collects_keep_their_scales(write: Callable[..., None], shared: bool) -> None:
    q, k = weights(0)
    both = torch.cat([q, k])
    given = [("q", both[:64]), ("k", both[64:])] if shared else [("q", q), ("k", k)]
    model = one_linear(128)
    with Session(model, "fp8_tensor", direct=False) as session:
        pairs = dict(session.pairs(given))
        write(model["a"].weight.data, 0, pairs["q"])
        write(model["a"].weight.data, 64, pairs["k"])
    assert model["a"].weight_scale.numel() == 2


def bucket(q: Tensor, k: Tensor) -> Tensor:
    """Both in one flat buffer, as trainers send them, behind something else."""
    return torch.cat([torch.ones(8, dtype=q.dtype), q.flatten(), k.flatten()])


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "columns, then transposed": lambda w, q, k: w.copy_(torch.cat([q.t(), k.t()], 1).t()),
    "a cat of cats": lambda w, q, k: w.copy_(torch.cat([torch.cat([q[:32], q[32:]]), torch.cat([k[:8], k[8:]])])),
    "quarters of a cat": lambda w, q, k: [w[i : i + 32].copy_(torch.cat([q, k])[i : i + 32]) for i in (96, 0, 64, 32)],
    "cast and cloned": lambda w, q, k: w.copy_(torch.cat([q, k])[:].clone().float().view(2, 64, 64).flatten(0, 1)),
    "computed by element": lambda w, q, k: w.copy_(torch.stack([q, k]).mul(1).flatten(0, 1)),
    "halves of staging": lambda w, q, k: staged(w, [q, k]),
    "index_put_": lambda w, q, k: w.index_put_(
        (torch.arange(64).repeat(2) + 64 * (torch.arange(128) < 64),), torch.cat([k, q])
    ),
    "flipped": lambda w, q, k: w.copy_(torch.cat([k.flip(0), q.flip(0)]).flip(0)),
    "index_copy_": lambda w, q, k: w.index_copy_(0, torch.arange(128), torch.stack([q, k]).flatten(0, 1)),
}


def load_joined(way: str, scheme: str, direct: bool) -> Any:
    q, k = weights(0)
    model = one_linear(128)
    with Session(model, scheme, direct=direct) as session:
        pairs = dict(session.pairs([("q", q), ("k", k)]))
        WAYS[way](model["a"].weight.data, pairs["q"], pairs["k"])
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_block"])
def test_joined_tensors_are_quantized_each_as_if_alone(way: str, scheme: str, direct: bool) -> None:
    q, k = weights(0)
    refused = {"flipped": "values of q, k.*Copy each"}
    if direct:  # of either tensor, the second half comes when the first is quantized
        refused["quarters of a cat"] = "direct=False"
    if way in refused:
        with pytest.raises(LoaderError, match=rf"a\.weight.*{refused[way]}"):
            load_joined(way, scheme, direct)
        scheme = "fp8_channel"
    model = load_joined(way, scheme, direct)
    assert_quantized(model["a"], torch.cat([q, k]), scheme, [64, 64])


@pytest.mark.parametrize("write", [by_slice, by_index])
def test_tensors_of_one_bucket_keep_their_scales(write: Callable[..., None]) -> None:
    q, k = weights(0)
    flat, model = bucket(q, k), one_linear(128)
    given = [("q", flat[8 : 8 + 4096].view(64, 64)), ("k", flat[8 + 4096 :].view(64, 64))]
    with Session(model, "fp8_block", direct=False) as session:
        pairs = dict(session.pairs(given))
        write(model["a"].weight.data, 64, pairs["k"])
        write(model["a"].weight.data, 0, pairs["q"])
    assert same_bytes(model["a"].weight_scale.data, schemes.quantize(torch.cat([q, k]), "fp8_block", [64, 64])[1])


def test_a_bucket_that_is_filled_again_hides_no_second_tensor() -> None:
    q, k = weights(0)
    buffer, model = torch.empty(64, 64, dtype=torch.bfloat16), one_linear(128)

    def received() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in (("q", q), ("k", k), ("k", k * 3)):
            yield name, buffer.copy_(tensor)

    with pytest.raises(CoverageError, match="k"), Session(model, "fp8_channel") as session:  # noqa: PT012
        for name, tensor in session.pairs(received()):
            model["a"].weight.data[0 if name == "q" else 64 :][:64].copy_(tensor)


def test_a_sum_of_two_tensors_is_no_join() -> None:
    """A loader may compute one parameter of several tensors; those of a cat are followed through."""
    q, k = weights(0)
    model = linears("a")
    with Session(model, "fp8_tensor") as session:
        pairs = dict(session.pairs([("q", q), ("k", k)]))
        model["a"].weight.data.copy_(pairs["q"] + pairs["k"])
    assert same_bytes(model["a"].weight.data, schemes.quantize(q + k, "fp8_tensor")[0])
