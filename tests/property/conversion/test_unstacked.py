"""Stacks of experts that are cut while they are converted have the bytes of matrices that were saved apart."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import octavo
from helpers import DTYPES, SCHEMES, random_weights, same_bytes, write_checkpoint
from helpers.folders import tensors_of
from helpers.properties import examples

BASE = "model.layers.0.mlp.experts"


@st.composite
def stacks(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same experts, in stacks and apart."""
    count, out, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 150)), draw(st.integers(1, 150))
    dtype, kind = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["normal", "bits", "sparse"]))
    seed, transposed, fused = draw(st.integers(0, 1 << 20)), draw(st.booleans()), draw(st.booleans())
    gate_up = random_weights((count, 2 * out, hidden), dtype, seed, kind)
    down = random_weights((count, hidden, out), dtype, seed + 1, kind)
    apart = {}
    for expert in range(count):
        gate, up = gate_up[expert].chunk(2)
        parts = {"gate_up": gate_up[expert]} if fused else {"gate": gate, "up": up}
        for leaf, matrix in {**parts, "down": down[expert]}.items():
            apart[f"{BASE}.{expert}.{leaf}_proj.weight"] = matrix
    names = ("fc1.weight", "fc2.weight") if fused else ("gate_up_proj", "down_proj")
    stacked = {f"{BASE}.{name}": stack for name, stack in zip(names, (gate_up, down), strict=True)}
    if transposed:
        stacked = {name: stack.transpose(1, 2) for name, stack in stacked.items()}
    other = {"model.layers.0.self_attn.q_proj.weight": random_weights((16, 32), dtype, seed + 2)}
    return {**stacked, **other}, {**apart, **other}


@examples(25)
@given(stacks(), st.sampled_from(SCHEMES), st.integers(1, 2), st.sampled_from([1 << 20, 8 << 20]), st.integers(1, 3))
def test_a_stack_that_is_cut_is_what_its_matrices_are_alone(
    both: tuple[dict[str, Tensor], dict[str, Tensor]], scheme: str, shards: int, staging_bytes: int, threads: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for name, tensors in zip(("stacked", "apart"), both, strict=True):
            source = write_checkpoint(Path(folder, name), tensors, shards, {"model_type": "any"})
            made = source.with_name(f"{name}-fp8")
            report = octavo.convert(
                source, made, scheme, staging_bytes=staging_bytes, threads=threads, prove=False, digests=True
            )
            results.append((source, made, report))
        (source, made, report), (_, other, _) = results
        mine, theirs = tensors_of(made), tensors_of(other)
        if "expert stack" not in str(report.kept):  # as some keep them, for columns that they can't take
            assert mine.keys() == theirs.keys()
            assert all(same_bytes(mine[name], theirs[name]) for name in mine)
            assert json.loads((made / "config.json").read_text()) == json.loads((other / "config.json").read_text())
        else:
            assert scheme in ("mxfp8", "int8_channel")
        assert octavo.verify(made, source).ok
        assert octavo.verify(made).ok
        streamed = dict(octavo.stream(source, scheme, staging_bytes=staging_bytes))
        assert streamed.keys() == mine.keys()
        assert all(same_bytes(streamed[name], mine[name]) for name in mine)
