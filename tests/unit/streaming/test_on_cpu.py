"""Tiles of codes: whichever way is taken, the bytes are those of decoding the whole and quantizing it."""

from __future__ import annotations

import pytest
import torch

from helpers import same_bytes
from octavo.checkpoint.codings import Coding, Decoding
from octavo.checkpoint.header import TensorInfo
from octavo.elements.pieces import whole
from octavo.numerics import schemes
from octavo.numerics.decoding import decode
from octavo.numerics.recoding import AT_ONCE
from octavo.planning.chunks import cut_apart
from octavo.planning.coded import lay_of
from octavo.streaming.coded import Encoded
from octavo.streaming.on_cpu import Tiles

NONE = TensorInfo("", "F8_E4M3", (), 0, 0, 0)


@pytest.mark.parametrize("sparse", ["nowhere", "in some rows", "everywhere"])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("group", [32, 64])
def test_fp8_is_requantized(sparse: str, at_once: bool, group: int) -> None:
    shape, elements, scheme = (37, 200), 640, schemes.get("fp8_channel")
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(shape, generator=generator) * 40).to(schemes.FP8)
    if sparse != "nowhere":
        codes[slice(11, 19) if sparse == "in some rows" else slice(None), ::7] = 0
    scale = torch.exp(torch.randn(37, -(-200 // group), generator=generator))
    decoding = Decoding("float8", 1, group)
    lay = lay_of(whole("", shape), shape)
    assert lay is not None
    x = Encoded(Coding("", shape, decoding, NONE, NONE), lay, codes, scale, None, shape, None)
    q, expected = schemes.quantize(decode(shape, codes, scale, decoding), scheme)

    tiles, out = Tiles(elements, torch.device("cpu")), torch.empty_like(q)
    assert tiles.at_once(x, scheme) == (AT_ONCE if group == 64 else 1)
    if at_once:
        cut = cut_apart(shape, scheme, (0, 0), elements * tiles.at_once(x, scheme))
        assert cut is not None
        assert len(cut) > 1
        amax, scales = tiles.scale_and_quantize(
            out, x, cut, lambda a: schemes.scale_from_amax(a, scheme), scheme, (0, 0)
        )
    else:
        amax = tiles.amax(x, scheme, (0, 0))
        scales = schemes.scale_from_amax(amax, scheme)
        tiles.quantize(out, x, scales, scheme, (0, 0))
    assert same_bytes(scales, expected)
    assert same_bytes(out, q)
