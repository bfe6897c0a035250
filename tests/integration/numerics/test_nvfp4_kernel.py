"""The kernel that quantizes to NVFP4, interpreted: the bytes of plain torch. Needs Triton, and no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPARE = """
import sys
import torch
from helpers import nvfp4_weights
from octavo.numerics import nvfp4, nvfp4_kernel

torch.cuda.current_device = lambda: -1  # as if the CPU were it

def interpreted(weight, search):
    stored = torch.empty((*weight.shape[:-1], nvfp4.stored_columns(weight.shape[-1])), dtype=torch.uint8)
    codes, scales = nvfp4.Packed.of(stored)
    scale = nvfp4.global_scale(weight.float().abs().amax((-2, -1), keepdim=True))
    table = nvfp4._errors(weight.device)
    nvfp4_kernel.quantize_into(codes, scales, weight, scale, table, search=search)
    return stored

for name in nvfp4_weights.NAMES:
    for number, weight in enumerate(nvfp4_weights.of(name)):
        if name == "tiny" and weight.dtype == torch.bfloat16:
            continue  # the interpreter takes subnormal numbers of bf16 for zeros
        search = sys.argv[1] == "search"
        expected = nvfp4_weights.quantized(weight, search)
        for lying in list(nvfp4_weights.layouts(weight))[number :: 3]:
            assert torch.equal(interpreted(lying, search), expected), (name, weight.dtype, lying.stride())
    print(name)
"""


@pytest.mark.parametrize("way", ["search", "first"])
def test_the_kernel_makes_the_bytes_of_plain_torch(way):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", COMPARE, way]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 7
