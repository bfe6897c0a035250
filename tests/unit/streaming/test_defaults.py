"""What the program has set as torch's defaults is nothing to octavo: vLLM loads with bf16 as the default dtype."""

from __future__ import annotations

import pytest
import torch

import octavo
from helpers import random_weights, same_bytes, write_checkpoint
from helpers.coded import fine_grained
from octavo.numerics import schemes


@pytest.mark.parametrize("coded", [False, True], ids=["bf16", "blocks"])
def test_bytes_do_not_depend_on_the_default_dtype(coded, tmp_path):
    weights = {f"{n}.weight": random_weights((256, 256), torch.bfloat16, n) for n in range(2)}
    write_checkpoint(tmp_path / "source", fine_grained(weights) if coded else weights)
    for scheme in schemes.SCHEMES:
        usual = dict(octavo.stream(tmp_path / "source", scheme, threads=1))
        torch.set_default_dtype(torch.bfloat16)
        try:
            found = dict(octavo.stream(tmp_path / "source", scheme, threads=1))
        finally:
            torch.set_default_dtype(torch.float32)
        assert found.keys() == usual.keys()
        assert all(same_bytes(found[name], usual[name]) for name in usual), scheme
