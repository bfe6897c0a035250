"""Weight-only products on a CPU, wherever new tensors go by default."""

from __future__ import annotations

import pytest
import torch

from helpers import random_weights
from octavo.numerics import schemes
from octavo.running.linear import linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", list(schemes.SCHEMES))
def test_products_are_computed_where_their_operands_are(scheme: str, dtype: torch.dtype) -> None:
    q, scale = schemes.quantize(random_weights((144, 160), torch.float32, 0), scheme)
    for rows in (4, 20):
        x = random_weights((rows, 160), dtype, 1)
        with torch.no_grad():
            wanted = linear(x, q, scale, scheme)
            with torch.device("meta"):
                assert torch.equal(linear(x, q, scale, scheme), wanted)
