"""The example, as users start it: vLLM's own options and octavo's flag, on two ranks of the CPU engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import octavo
from helpers.models import add_tokenizer
from helpers.vllm_engine import ENVIRONMENT

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("vllm_engine"),
]

REPOSITORY = Path(__file__).resolve().parents[4]
LINE = "--enforce-eager --dtype=bfloat16 --max_model_len=2048 --quantization={} -tp=2"
MORE = " --block-size 64 --gpu-memory-utilization 0.3 --trust-remote-code"


@pytest.fixture(scope="module")
def opt_125m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exactly OPT-125M's shape, random."""
    folder = tmp_path_factory.mktemp("example") / "opt-125m"
    subprocess.run([sys.executable, REPOSITORY / "benchmarks" / "make_checkpoint.py", "opt-125m", folder], check=True)
    add_tokenizer(folder, 50272)
    return folder


def generate(model: Path, options: str) -> tuple[list[str], str]:
    """-> the lines that the example prints, and all that it says."""
    example = [sys.executable, str(REPOSITORY / "examples" / "vllm_generate.py")]
    finished = subprocess.run(
        [*example, "--model", str(model), *options.split(), "--max-tokens", "8"],
        env={**os.environ, **ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
    return [line for line in finished.stdout.splitlines() if "' -> '" in line], finished.stdout


def test_the_example_says_what_stock_vllm_says_of_the_converted_checkpoint(opt_125m: Path) -> None:
    converted = opt_125m.with_name("fp8")
    octavo.convert(opt_125m, converted, "fp8_channel")
    expected, _ = generate(converted, LINE.format("compressed-tensors"))
    assert len(expected) == 3
    for options in (LINE, LINE + MORE):
        said, output = generate(opt_125m, options.format("octavo_fp8_channel"))
        assert said == expected
        # q, k and v are one layer of vLLM; twelve of four, on each rank
        assert output.count("octavo: 48 layers (72 tensors) became fp8_channel") == 2
