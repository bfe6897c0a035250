"""The kernel that decodes on a GPU, interpreted: the bytes, and the errors, of a CPU. Needs Triton, and no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = pytest.mark.timeout(300)  # six seconds each, of a processor that is free

NONE = """
import sys
from pathlib import Path
import pytest
from helpers.decoding_by_kernel import launched, prepare
prepare()
from unit.streaming import test_coded_there as those
for number, (decoding, seed, part, value) in enumerate(those.NONE):
    for scheme in ("fp8_channel", "fp8_block"):
        folder = Path(sys.argv[1], f"{number}-{scheme}")
        those.test_what_a_cpu_refuses_is_refused_in_the_same_words(decoding, seed, part, value, scheme, folder)
folder = Path(sys.argv[1], "fp16")
those.test_a_weight_that_fp16_does_not_hold_is_refused(2, folder)
assert launched[0] >= 21, launched
"""
STACKS = """
import sys
from pathlib import Path
from helpers.decoding_by_kernel import launched, prepare
prepare()
from unit.streaming import test_coded_there as those
for decoding, scheme, most in ((those.FP8, "fp8_block", 4), (those.FP8, "fp8_channel", 2), (those.MXFP4, None, 3)):
    before, folder = launched[0], Path(sys.argv[1], f"{decoding.kind}-{scheme}")
    those.test_experts_are_decoded_together_and_their_bytes_are_those_of_the_host(decoding, scheme, folder)
    assert launched[0] - before == most, (decoding, scheme, launched[0] - before)
"""


def interpreted(*command: str) -> str:
    paths = [str(Path(__file__).parents[2]), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["blocks", "float8", "int8", "int4", "mxfp4", "nvfp4"])
def test_a_stream_by_kernels_makes_the_bytes_of_a_cpu(kind: str) -> None:
    assert interpreted("-m", "helpers.decoding_by_kernel", kind).endswith("done\n")


def test_what_a_cpu_refuses_kernels_notice(tmp_path: Path) -> None:
    interpreted("-c", NONE, str(tmp_path))


def test_experts_of_a_stack_pass_through_or_are_quantized_by_a_few_launches(tmp_path: Path) -> None:
    interpreted("-c", STACKS, str(tmp_path))
