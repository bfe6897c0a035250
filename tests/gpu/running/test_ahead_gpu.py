"""After a load, a forward compiles nothing: whatever it launches was compiled while files were waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo.running import fp8

sys.path.insert(0, str(Path(__file__).parents[2] / "integration"))
from _models import make_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and fp8.has_units(torch.cuda.current_device()) and fp8.has_kernels()),
        reason="no FP8 units, or no Triton",
    ),
]

LOAD = """
import json, os, sys, threading
import torch, octavo

def compiled():
    return sorted(os.listdir(os.environ["TRITON_CACHE_DIR"]))

way, folder, scheme = sys.argv[1:]
if way == "octavo.load":
    model = octavo.load(folder, scheme, device="cuda")
else:
    from transformers import AutoModelForCausalLM
    options = {"quantization_config": octavo.OctavoConfig(scheme), "device_map": "cuda"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
for thread in threading.enumerate():
    if thread.name == "octavo-compile":
        thread.join()
from octavo.running.ahead import wanted
errors = [repr(job.error) for job in wanted.values() if job.error is not None]
before = compiled()
with torch.no_grad():
    for tokens in (1, 2, 5, 17, 40, 100, 128):
        for batch in (1, 7):
            model(torch.ones(batch, tokens, dtype=torch.long, device="cuda"))
torch.cuda.synchronize()
print(json.dumps({"errors": errors, "before": before, "later": [name for name in compiled() if name not in before]}))
"""


@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "fp8_tensor", "mxfp8"])
@pytest.mark.parametrize(
    ("way", "name"), [("octavo.load", "llama"), ("octavo.load", "qwen2_moe"), ("from_pretrained", "mixtral")]
)
def test_a_forward_after_a_load_compiles_nothing(way, name, scheme, tmp_path):
    folder = make_checkpoint(name, tmp_path / name)
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    command = [sys.executable, "-c", LOAD, way, str(folder), scheme]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(kernels)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == []
    assert len(found["before"]) > 3
    assert found["later"] == []
