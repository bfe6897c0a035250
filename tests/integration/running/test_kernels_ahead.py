"""The kernels that are compiled ahead are those that a forward then asks for. Needs Triton, and no GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# Triton compiles for a GPU that is not there: what launches is replaced, what decides about binaries is Triton's own
PRETEND = """
import json, os, sys, types
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

class Driver:
    utils = None
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    launcher_cls = staticmethod(lambda source, metadata: None)

triton.runtime.driver.set_active(Driver())
h100 = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448)
torch.cuda.get_device_properties = lambda *_: h100
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.current_device = lambda: 0

from helpers.experts import small_model
from octavo.running import ahead, fp8, launching
"""

COMPILE = """
def binaries():
    return len(os.listdir(os.environ["TRITON_CACHE_DIR"]))

fp8.library.takes = lambda *_: False  # there is no library either
products = ahead.products_of(small_model(sys.argv[1]))
jobs = ahead.note(products)
for job in jobs:
    job.run()
compiled = binaries()

# the forward: tensors with memory, on what is taken for the current device
torch.cuda.current_device = lambda: -1
JITFunction.__getitem__ = lambda self, grid: lambda *args, **options: self.warmup(*args, grid=grid, **options)
launching._DIRECT = False
ahead._meta = lambda shape, dtype: torch.zeros(shape, dtype=torch.uint8).to(dtype)
launched = []
launch = launching.Launch.__call__
def count(self, *tensors):
    launched.append(self._kernel.__name__)
    launch(self, *tensors)
launching.Launch.__call__ = count
for cached in (fp8._way, fp8._layout, fp8._tile):
    cached.cache_clear()  # what was decided for the current device
for product in products:
    for rows in (1, 5, 17, 35, 40, 100, 300, 500):
        product.rehearse(rows)
again = len(ahead.note(products))
found = {"jobs": len(jobs), "compiled": compiled, "later": binaries() - compiled, "again": again}
print(json.dumps({**found, "launched": sorted(set(launched))}))
"""


@pytest.mark.parametrize(
    ("scheme", "kernel"), [("fp8_channel", "_quantize_rows"), ("int8_channel", "_widen"), ("nvfp4", "_unpack")]
)
def test_the_forward_asks_for_no_binary_that_was_not_compiled_ahead(scheme, kernel, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-c", PRETEND + COMPILE, scheme]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=300)
    found = json.loads(done.stdout)
    assert found["compiled"] == found["jobs"] > 5
    assert found["later"] == 0
    assert found["again"] == 0
    assert found["launched"] == sorted(["_combine_kernel", "_product_kernel", f"{kernel}_kernel", "_sort_kernel"])


LOAD = """
import contextlib, threading, time
torch.cuda.device = lambda index: contextlib.nullcontext()
fp8.has_units = lambda index: True
with ahead.Ahead(["cuda:0"]) as compiling:
    compiling.begin(small_model(sys.argv[1]))
    while not ahead.wanted:
        time.sleep(0.01)
    print("begun", flush=True)
    if sys.argv[2] == "interrupted":
        time.sleep(100)
"""


@pytest.mark.parametrize("end", ["ends", "interrupted"])
def test_a_process_that_ends_meanwhile_waits_for_no_more_than_what_is_being_compiled(end, tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TRITON_CACHE_DIR": str(tmp_path),
    }
    command = [sys.executable, "-c", PRETEND + LOAD, "fp8_channel", end]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        if end == "interrupted":
            os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=100)
    if end == "ends":
        assert (process.returncode, error) == (0, "")
    else:
        assert process.returncode != 0
        assert error.splitlines()[-1] == "KeyboardInterrupt"
    assert len(os.listdir(tmp_path)) < 8  # of some twenty
