"""Record a loader on symbols, then stream: the bytes of the online way, only a rank's slices read, gaps found first."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import SCHEMES, same_bytes, write_checkpoint
from helpers.engine import Model, Rank, Shape, checkpoint
from octavo.errors import CheckpointError, CoverageError, LoaderError
from octavo.numerics import schemes
from octavo.session import Session

SHAPE = Shape(hidden=160, inner=208, heads=8, kv_heads=4, head_dim=24, experts=4, vocab=128)


def online(rank: Rank, scheme: str | None, pairs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    model = Model(SHAPE, rank, **options)
    with Session(model, scheme, "cpu"):
        model.load_weights(pairs.items())
    return dict(model.named_parameters())


@pytest.mark.parametrize("rank", [Rank(), Rank(1, 2), Rank(3, 4), Rank(5, 8)], ids=lambda r: f"{r.number}of{r.size}")
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
def test_a_recorded_plan_streams_the_bytes_of_the_online_way(rank: Rank, moe: bool, tmp_path: Path) -> None:
    pairs = checkpoint(SHAPE, moe=moe)
    folder = write_checkpoint(tmp_path, pairs, shards=2)
    for scheme in (None, *SCHEMES):
        expected = online(rank, scheme, pairs, moe=moe)
        model = Model(SHAPE, rank, moe=moe)
        session = Session(model, scheme)
        session.stream(session.record(folder))
        found = dict(model.named_parameters())
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            assert same_bytes(found[name].data, parameter.data), name
        finished = [event.layer for event in session.events if event.kind == "finish"]
        assert len(finished) == len(set(finished)) == len(session.inventory.layers)


def padded_bytes(model: Model) -> int:
    """Bytes of the embedding, which is loaded online where it has padding."""
    embedding = model.embed_tokens
    return 0 if embedding.rows == embedding.weight.shape[0] else embedding.weight.nbytes


def test_a_rank_reads_its_slices_and_no_others(tmp_path: Path) -> None:
    pairs = checkpoint(SHAPE)
    folder = write_checkpoint(tmp_path, pairs)
    for rank in (Rank(), Rank(1, 4)):
        model = Model(SHAPE, rank)
        plan = Session(model, "fp8_channel").record(folder)
        wanted = sum(parameter.nbytes for parameter in model.parameters()) - padded_bytes(model)
        assert sum(piece.numel * 2 for p in plan.placements for piece in p.pieces) == wanted
        assert all(piece.src_name in pairs for p in plan.placements for piece in p.pieces)


def test_a_file_that_is_cut_off_while_a_loader_computes_is_named(tmp_path: Path) -> None:
    """What is loaded online is read, not mapped, so the process is not ended by a signal."""
    folder = write_checkpoint(tmp_path, {"a.weight": torch.ones(8, 8), "b.weight": torch.ones(200, 200)})
    file = folder / "model.safetensors"
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False), "b": nn.Linear(200, 200, bias=False)})
    streaming: list[bool] = []

    def load(pairs: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in pairs:
            model.get_parameter(name).data.copy_(tensor + 1)
            if streaming:
                os.truncate(file, 4096)

    session = Session(model, None)
    plan = session.record(folder, load)
    streaming.append(True)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ended at byte 4,096 .*tensor 'b\.weight'"):
        session.stream(plan)


def test_what_a_loader_computes_is_loaded_online_and_the_report_says_so(tmp_path: Path) -> None:
    class Computing(Model):
        def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
            def changed() -> Iterable[tuple[str, Tensor]]:
                for name, tensor in weights:
                    if name.endswith("norm.weight"):
                        tensor = tensor + 1
                    if name == "layers.0.self_attn.k_proj.weight":
                        tensor = tensor.flip(0)
                    yield name, tensor

            return super().load_weights(changed())

    pairs = checkpoint(SHAPE)
    folder = write_checkpoint(tmp_path, pairs)
    expected = Computing(SHAPE)
    with Session(expected, "fp8_block"):
        expected.load_weights(pairs.items())
    model = Computing(SHAPE)
    session = Session(model, "fp8_block")
    plan = session.record(folder)
    assert session.recording is not None
    assert "computed by aten.add" in session.recording.online["norm.weight"]
    assert session.recording.online.keys() == {
        "norm.weight",
        "layers.0.input_layernorm.weight",
        "layers.1.input_layernorm.weight",
        "layers.0.self_attn.qkv_proj.weight",
    }
    assert "layers.0.self_attn.qkv_proj.weight" not in {p.name for p in plan.placements}
    session.stream(plan)
    assert any("norm.weight: loaded online: computed by aten.add" in note for note in session.report.notes)
    for (name, a), (_, b) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert same_bytes(a.data, b.data), name


def test_coverage_is_checked_before_a_weight_is_read(tmp_path: Path) -> None:
    pairs = checkpoint(SHAPE)
    del pairs["layers.0.mlp.up_proj.weight"], pairs["norm.weight"]
    folder = write_checkpoint(tmp_path, pairs)
    with pytest.raises(CoverageError) as caught:
        Session(Model(SHAPE), "fp8_channel").record(folder)
    text = str(caught.value)
    assert "layers.0.mlp.gate_up_proj.weight [416, 160]: nothing would write [208:416, 0:160]" in text
    assert "norm.weight [160]: no checkpoint tensor goes there" in text


def test_a_box_that_two_tensors_write_is_found_from_headers(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False)})
    folder = write_checkpoint(tmp_path, {"x": torch.ones(8, 64), "y": torch.ones(8, 64)})

    def load(pairs: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in pairs:
            model["a"].weight.data.copy_(tensor)

    with pytest.raises(CoverageError, match=r"a.weight\[0:8, 0:64\] is written twice: by x, and by y"):
        Session(model).record(folder, load)


def test_recording_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Model(SHAPE)
    before = {name: (id(p), p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    Session(model).record(write_checkpoint(tmp_path, checkpoint(SHAPE)))
    for name, parameter in model.named_parameters():
        number, address, values = before[name]
        assert (id(parameter), parameter.data_ptr()) == (number, address)
        assert same_bytes(parameter.data, values.data)


def test_a_transform_that_moves_is_part_of_the_plan_and_tensors_that_nothing_takes_are_named(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False, dtype=torch.bfloat16)})
    weight = torch.randn(64, 8).bfloat16()
    folder = write_checkpoint(tmp_path, {"model.a.weight": weight, "extra": torch.ones(3)})

    def transform(name: str, tensor: Tensor) -> Any:
        return None if name == "extra" else (name.removeprefix("model."), tensor.t())

    session = Session(model, None, transform=transform)
    plan = session.record(folder)
    assert dict(plan.unused) == {"extra": "no parameter of this rank takes it"}
    session.stream(plan)
    assert same_bytes(model["a"].weight.data, weight.t().contiguous())


def test_tensors_that_a_loader_joins_keep_their_parts_both_ways(tmp_path: Path) -> None:
    """Gate and up of 100 rows each are blocks of their own, even where the loader makes one tensor of them first."""
    gate, up = (torch.randn(100, 64, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (1, 2))
    folder = write_checkpoint(tmp_path, {"gate": gate, "up": up})

    def loading(model: nn.ModuleDict) -> Any:
        def load(pairs: Iterable[tuple[str, Tensor]]) -> None:
            found = dict(pairs)
            model["a"].weight.data.copy_(torch.cat([found["gate"], found["up"]]))

        return load

    for scheme in SCHEMES:
        for way in ("direct", "layer", "plan"):
            model = nn.ModuleDict({"a": nn.Linear(64, 200, bias=False, dtype=torch.bfloat16)})
            session = Session(model, scheme, direct=way == "direct")
            if way == "plan":
                session.stream(session.record(folder, loading(model)))
            else:
                with session:
                    loading(model)(session.pairs([("gate", gate), ("up", up)]))
            q, scale = schemes.quantize(torch.cat([gate, up]), scheme, (100, 100))
            assert same_bytes(model["a"].weight.data, q), (scheme, way)
            assert same_bytes(model["a"].weight_scale.data, scale), (scheme, way)


def test_a_checkpoint_of_another_dtype_is_cast_by_the_loader(tmp_path: Path) -> None:
    pairs = {name: tensor.float() * 1.001 for name, tensor in checkpoint(SHAPE).items()}
    folder = write_checkpoint(tmp_path, pairs)
    model = Model(SHAPE)
    session = Session(model, "fp8_channel")
    session.stream(session.record(folder))
    assert session.recording is not None
    assert session.recording.online["norm.weight"] == "cast from fp32 to bf16"
    expected = online(Rank(), "fp8_channel", pairs)
    for name, parameter in model.named_parameters():
        assert same_bytes(parameter.data, expected[name].data), name


def test_sessions_that_can_not_record_say_so(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, checkpoint(SHAPE))
    with pytest.raises(LoaderError, match="recording is for a session"):
        Session(Model(SHAPE), lambda layer: None).record(folder)
    first, second = Session(Model(SHAPE)), Session(Model(SHAPE))
    plan = first.record(folder)
    with pytest.raises(LoaderError, match="not recorded by this session"):
        second.stream(plan)


class Dequantized:
    """Takes an FP8 checkpoint with block scales: hands on a bf16 weight when both halves have come."""

    def __init__(self) -> None:
        self.waiting: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor) -> Any:
        if not name.endswith(("proj.weight", "proj.weight_scale_inv")):
            return name, tensor
        stem = name.removesuffix("_scale_inv")
        if stem not in self.waiting:
            self.waiting[stem] = tensor
            return None
        other = self.waiting.pop(stem)
        weight, scale = (other, tensor) if name.endswith("_inv") else (tensor, other)
        rows, cols = weight.shape
        spread = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
        return stem, (weight.float() * spread).bfloat16()


@pytest.mark.parametrize("way", ["online", "plan"])
def test_a_transform_dequantizes_an_fp8_source_before_the_loader_sees_it(way: str, tmp_path: Path) -> None:
    source, plain = {}, {}
    for name, tensor in checkpoint(SHAPE).items():
        if not name.endswith("proj.weight"):
            source[name] = plain[name] = tensor
            continue
        q, scale = schemes.quantize(tensor, "fp8_block")
        source[name], source[f"{name}_scale_inv"] = q, scale
        plain[name] = schemes.dequantize(q, scale, "fp8_block").bfloat16()
    expected = online(Rank(1, 2), "fp8_channel", plain)
    model = Model(SHAPE, Rank(1, 2))
    session = Session(model, "fp8_channel", transform=Dequantized())
    if way == "online":
        with session:
            model.load_weights(source.items())
    else:
        session.stream(session.record(write_checkpoint(tmp_path, source)))
        assert session.recording is not None
        assert "computed by" in session.recording.online["layers.0.mlp.down_proj.weight"]
        assert "norm.weight" not in session.recording.online
    for name, parameter in model.named_parameters():
        assert same_bytes(parameter.data, expected[name].data), name


def double(tensor: Tensor) -> Tensor:
    return tensor.mul_(2)


def zero_half(tensor: Tensor) -> Tensor:
    tensor[:, :32] = 0
    return tensor


def negate(tensor: Tensor) -> Tensor:
    return torch.neg(tensor, out=tensor)


def change_a_clone(tensor: Tensor) -> Tensor:
    clone = tensor.clone()
    clone[::2].add_(1)
    return clone


def through_a_buffer(tensor: Tensor) -> Tensor:
    buffer = torch.empty(64, 64)
    buffer[:32].copy_(tensor[:32])
    buffer[32:].copy_(tensor[32:])
    return buffer


@pytest.mark.parametrize("change", [double, zero_half, negate, change_a_clone, through_a_buffer])
def test_a_tensor_that_is_changed_in_place_is_loaded_online(change: Any, tmp_path: Path) -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64, bias=False) for name in "ab"})
    tensors = {"a": torch.randn(64, 64), "b": torch.randn(64, 64)}

    def load(pairs: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in pairs:
            model[name].weight.data.copy_(change(tensor) if name == "a" else tensor)

    session = Session(model)
    session.stream(session.record(write_checkpoint(tmp_path, tensors), load))
    assert session.recording is not None
    assert session.recording.online.keys() == {"a.weight"}
    expected = change(tensors["a"].clone())
    assert same_bytes(model["a"].weight.data, schemes.quantize(expected, "fp8_channel")[0])
    assert same_bytes(model["b"].weight.data, schemes.quantize(tensors["b"], "fp8_channel")[0])


@pytest.mark.parametrize("ask", [lambda t: t[0, 0].item(), lambda t: bool((t > 0).any()), lambda t: torch.equal(t, t)])
def test_a_loader_that_asks_for_values_cannot_be_recorded(ask: Any, tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8, bias=False)})

    def load(pairs: Iterable[tuple[str, Tensor]]) -> None:
        for _, tensor in pairs:
            model["a"].weight.data.copy_(tensor if ask(tensor) else -tensor)

    with pytest.raises(LoaderError, match="can't be recorded: .* needs the values of x"):  # noqa: RUF043
        Session(model).record(write_checkpoint(tmp_path, {"x": torch.ones(8, 64)}), load)
