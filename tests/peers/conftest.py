"""Skips what needs a vLLM or an SGLang that is not here."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session")
def vllm_loads() -> None:
    """For tests that load models of vLLM: needs its Python modules."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: make peers-vllm")


@pytest.fixture(scope="session")
def vllm_engine(vllm_loads: None) -> None:
    """For tests that run vLLM's engine: its compiled kernels, which fit one version of torch."""
    code = "import torch; from vllm.platforms import current_platform as p; p.import_kernels(); torch.ops._C.rms_norm"
    if subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=100).returncode:
        pytest.skip("vLLM's kernels can't be loaded with this torch")


@pytest.fixture(scope="session")
def sglang_loads() -> None:
    """For tests that load models of SGLang: needs its Python modules, none of its kernels."""
    if find_spec("sglang") is None:
        pytest.skip("SGLang is not installed: make peers-sglang")
