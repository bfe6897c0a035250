"""The kernel that quantizes to NVFP4 makes the bytes of a CPU, of whatever weights, however they lie."""

from __future__ import annotations

import pytest
import torch

from helpers import nvfp4_weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", nvfp4_weights.NAMES)
@pytest.mark.parametrize("search", [True, False])
def test_a_gpu_makes_the_bytes_of_a_cpu(name, search):
    for weight in nvfp4_weights.of(name):
        expected = nvfp4_weights.quantized(weight, search)
        for lying in nvfp4_weights.layouts(weight):
            found = nvfp4_weights.quantized(nvfp4_weights.on_gpu(lying), search).cpu()
            assert torch.equal(found, expected)
