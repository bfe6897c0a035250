"""Sources that are quantized already: the bytes of decoding whole tensors first, whatever is read at once."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from unittest import mock

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from helpers import SCHEMES, run_plan, same_bytes
from helpers.coded import BLOCKS, coding_of, encoded, write_coded
from helpers.properties import examples
from octavo.checkpoint.codings import Decoding
from octavo.elements.symbolic import Symbolic
from octavo.numerics import schemes
from octavo.numerics.lossless import lossless_scale, unit_of
from octavo.planning import chunks, kinds
from octavo.planning.budget import Budget
from octavo.planning.coded import decoded_there
from octavo.planning.placement import Target
from octavo.planning.plan import make_plan
from octavo.planning.recipe import Recipe

from .test_numerics import SIDES, WAYS, Way

FP4 = Decoding("e2m1", 1, 32)
INT4 = Decoding("int4_in_int32", 1, 32)
INT8 = Decoding("int8_in_int32", 1, None)
DECODINGS = st.one_of(
    st.builds(
        Decoding,
        st.sampled_from(["float8", "int8"]),
        st.sampled_from([None, 1, 7, 128]),
        st.sampled_from([None, 5, 128]),
    ),
    st.builds(
        Decoding,
        st.sampled_from(["int4_in_int32", "int8_in_int32", "e2m1"]),
        st.just(1),
        st.sampled_from([None, 16, 32]),
        st.booleans(),
    ),
)


@examples(25)
@given(
    rows=st.lists(SIDES, min_size=1, max_size=2),
    cols=SIDES,
    stacked=st.one_of(st.none(), st.integers(1, 3)),
    cut=st.one_of(st.none(), st.tuples(st.floats(0, 1), st.floats(0, 1))),
    permuted=st.booleans(),
    scheme=st.sampled_from([*SCHEMES, None]),
    decoding=DECODINGS,
    seed=st.integers(0, 1 << 30),
    way=WAYS,
    transposed=st.booleans(),
    stored_transposed=st.booleans(),
)
@example([130], 300, 2, (0.4, 0.6), True, "fp8_block", BLOCKS, 0, Way(700, 2, 1 << 20, 50, 1), False, False)
@example([260, 130], 257, None, None, False, "fp8_block", BLOCKS, 0, Way(None, 2, 1 << 20, 50, 1), False, False)
@example([260], 257, 2, None, False, "fp8_channel", BLOCKS, 0, Way(None, 2, 1 << 20, 1000, 1), True, True)
@example([1], 2, None, (0.0, 0.0), False, "fp8_channel", INT4, 0, Way(None, None, 1 << 20, 50, 1), False, True)
@example([70, 33], 160, 2, None, False, "fp8_channel", FP4, 0, Way(700, 2, 1 << 20, 50, 1), False, False)
@example([70, 33], 160, 2, None, False, "fp8_tensor", FP4, 1, Way(700, 2, 1 << 20, 50, 1), False, False)
@example([70], 131, 3, (0.3, 0.9), False, None, INT4, 1, Way(700, 2, 1 << 20, 50, 1), True, True)
@example([130], 300, 2, (0.4, 0.6), False, "fp8_block", BLOCKS, 0, Way(700, 2, 1 << 20, 50, 1, 2, 5), False, False)
@example([260], 257, 2, None, False, "fp8_tensor", BLOCKS, 0, Way(4096, 2, 1 << 20, 1000, 1, 2, 2), True, True)
@example([70, 33], 160, 2, None, False, "fp8_channel", FP4, 0, Way(700, 2, 1 << 20, 50, 1, 1, 5), False, False)
@example([64], 160, None, None, True, "fp8_channel", FP4, 1, Way(4096, 2, 1 << 20, 700, 1, 3, 1), True, False)
@example([256], 384, 3, None, False, "fp8_channel", INT4, 3, Way(None, 2, 1 << 20, 5000, 1, 2, 1), False, False)
@example([5, 2], 7, 2, None, False, "int8_channel", INT8, 0, Way(None, None, 1 << 20, 50, 1), False, False)
def test_bytes_are_those_of_decoding_whole_tensors(
    rows, cols, stacked, cut, permuted, scheme, decoding, seed, way, transposed, stored_transposed
):
    """Gate and up (or one matrix) of experts (or of none), with rows in another order, and some columns of them."""
    sources = {}
    for part, n in enumerate(rows):
        for expert in range(stacked or 1):
            name, shape = f"{part}.{expert}", (cols, n) if transposed else (n, cols)
            coding = coding_of(name, shape, decoding, stored_transposed)
            sources[name] = (coding, encoded(coding, seed + 10 * part))

    def shuffled(tensor):
        n = tensor.shape[0]
        return (
            tensor
            if n % 2 or transposed != stored_transposed or not permuted
            else tensor.reshape(2, n // 2, -1).transpose(0, 1).reshape(n, -1)
        )

    def fuse(tensors):
        tensors = {name: shuffled(tensor.mT if transposed else tensor) for name, tensor in tensors.items()}
        bands = [[tensors[f"{part}.{expert}"] for expert in range(stacked or 1)] for part in range(len(rows))]
        return torch.cat([band[0] if stacked is None else torch.stack(band) for band in bands], -2)

    columns = None
    if cut is not None:
        start, stop = sorted(round(at * cols) for at in cut)
        columns = (start, stop) if start < stop else (max(0, start - 1), max(1, start))
    symbols = {name: Symbolic.source(name, coding.shape, torch.bfloat16) for name, (coding, _) in sources.items()}
    fused = fuse(symbols)
    role = kinds.LINEAR if stacked is None else kinds.EXPERTS
    target = Target("p", tuple(fused.shape), None, role, tuple(fused.pieces))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, weights = write_coded(Path(folder), sources, shards=2)
        plan = make_plan(checkpoint, [target], Recipe(scheme), way.staging_bytes)
        placement = dataclasses.replace(plan.placements[0], columns=columns)
        plan = dataclasses.replace(plan, placements=(placement,))
        fit = Budget.fit(plan.placements, plan.staging_bytes, way.threads, way.slot_bytes)
        scratch = min(fit.scratch_elements, way.tile_elements)
        lanes = way.lanes if decoded_there(placement.pieces, dict(placement.codings)) else 0
        budget = dataclasses.replace(
            fit, scratch_elements=scratch, lanes=lanes, block_bytes=way.block_slots * fit.slot_bytes
        )
        with mock.patch.object(chunks, "_MIN_RUN_BYTES", way.min_run_bytes):
            storages, tally = run_plan(checkpoint, plan, budget=budget)
    storage, whole = storages["p"], fuse(weights).contiguous()
    within = slice(None) if columns is None else slice(*columns)
    assert tally.placed_bytes == placement.final_bytes
    if scheme is None:
        assert same_bytes(storage.weight, whole[..., within].bfloat16())
        return
    group = schemes.get(scheme).group_cols
    cells = slice(None) if columns is None or group is None else slice(columns[0] // group, -(-columns[1] // group))
    if placement.passed:
        codes = fuse({name: numbers_of(*source) for name, source in sources.items()})
        assert same_bytes(storage.weight.view(torch.uint8), codes[..., within])
        assert (
            same_bytes(schemes.dequantize(*everything(storage, placement), scheme, placement.parts), whole) or columns
        )
        return
    if placement.lossless:
        units = []
        for part in range(len(rows)):
            band = [unit_of_source(*sources[f"{part}.{expert}"]) for expert in range(stacked or 1)]
            units.append(band[0] if stacked is None or band[0] is None else torch.stack(band))
        q, scale = kept(whole, scheme, placement.parts, units)
    else:
        q, scale = schemes.quantize(whole, scheme, placement.parts)
    assert same_bytes(storage.weight, q[..., within])
    assert same_bytes(storage.scale, scale if group is None else scale[..., cells])


def numbers_of(coding, parts):
    """The bytes of FP8 or int8: those stored, or four of them in a word, which are 128 more."""
    stored = parts["codes"].view(torch.uint8)
    return stored[..., : coding.matrix[-1]] ^ 128 if coding.decoding.kind == "int8_in_int32" else stored


def unit_of_source(coding, parts):
    globally = parts.get("global_scale")
    return unit_of(coding.decoding, None if globally is None else globally.reshape(1, 1))


def kept(weight, scheme, parts, units):
    """`schemes.quantize` with the scales of `lossless_scale`; ``units`` are those of the parts."""
    scheme, start, found = schemes.get(scheme), 0, []
    for rows, unit in zip(parts, units, strict=True):
        part = weight[..., start : start + rows, :]
        scale = lossless_scale(schemes.group_amax(part, scheme), unit)
        q = torch.empty(part.shape, dtype=scheme.dtype)
        schemes.quantize_into(q, part, scale, scheme)
        found.append((q, scale))
        start += rows
    q, scale = (torch.cat(each, -2) for each in zip(*found, strict=True))
    return q, schemes.to_stored(scale, scheme).reshape(scheme.scale_shape(weight.shape, parts))


def everything(storage, placement):
    return storage.weight, storage.scale
