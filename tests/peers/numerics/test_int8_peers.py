"""int8 against compressed-tensors: given the same scales, its numbers and its packed ones are octavo's, bit by bit.

Its own scales are others: amax / 127.5, by which the largest weight of a row is cut off.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import DTYPES, random_weights
from helpers.properties import examples
from octavo.conversion import packing
from octavo.numerics import schemes

pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.peers


@examples(50)
@given(
    rows=st.integers(1, 40),
    words=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["normal", "sparse"]),
    seed=st.integers(0, 1 << 30),
)
def test_numbers_and_packed_numbers_are_compressed_tensors(
    rows: int, words: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    weight = random_weights((rows, words * packing.EACH), dtype, seed, kind)
    q, scale = schemes.quantize(weight, "int8_channel")
    arguments = preset_name_to_scheme("INT8", ["Linear"]).weights
    assert torch.equal(quantize(weight.float(), scale, None, arguments, dtype=torch.int8), q)
    values = dequantize(q, scale, None, arguments, dtype=torch.float32)
    assert torch.equal(values, schemes.dequantize(q, scale, "int8_channel"))
    packed = packing.flip(q.clone()).view(torch.int32)
    assert torch.equal(packed, pack_to_int32(q, 8))
    assert torch.equal(unpack_from_int32(packed, 8, torch.Size(weight.shape)), q)
