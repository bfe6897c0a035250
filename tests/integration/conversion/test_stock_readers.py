"""What is written loads in stock transformers, without octavo, as the weights that it stands for.

Three cases that are always tried; `tests/peers/conversion/test_formats.py` has the whole table.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from _models import make_checkpoint
from packaging.version import Version

import octavo
from helpers.stock import different, from_stock, logits_of, write_reference

pytest.importorskip("compressed_tensors")

# transformers says that it merges `dequantize=True` into the checkpoint's own config, which is what is asked of it
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")

EVEN = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
}
CASES = [
    pytest.param("llama", "compressed-tensors", "fp8_channel", 14, id="Llama, channel"),
    pytest.param("qwen2_moe", "compressed-tensors", "fp8_channel", 2 * (4 + 3 * 7), id="Qwen2-MoE, channel"),
    pytest.param("llama", "fp8", "fp8_block", 14, id="Llama, the fp8 format"),
]

Written = Callable[[str, str, str, int], tuple[Path, Any]]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Architecture, format, scheme, how many are quantized -> the conversion's folder, the model that it stands for."""
    made: dict[tuple[str, str, str], tuple[Path, Any]] = {}

    def get(architecture: str, format: str, scheme: str, count: int) -> tuple[Path, Any]:
        key = (architecture, format, scheme)
        if key not in made:
            root = tmp_path_factory.mktemp(architecture)
            sizes = EVEN if architecture == "qwen2_moe" else {"hidden_size": 128, "intermediate_size": 256}
            source = make_checkpoint(architecture, root / "source", **sizes)
            octavo.convert(source, root / "out", scheme, format=format)
            assert write_reference(source, root / "out", root / "reference", format, scheme) == count
            made[key] = root / "out", from_stock(root / "reference")
        return made[key]

    return get


@pytest.mark.parametrize(("architecture", "format", "scheme", "count"), CASES)
def test_transformers_dequantizes_every_weight_to_the_same_bits(
    architecture: str, format: str, scheme: str, count: int, written: Written
) -> None:
    folder, reference = written(architecture, format, scheme, count)
    model = from_stock(folder, dequantize=True)
    assert different(model, reference) == []
    # compressed-tensors before 0.20 unpacks the weights, and leaves a forward that quantizes activations all the same
    if format != "compressed-tensors" or Version(metadata.version("compressed-tensors")) >= Version("0.20"):
        assert logits_of(model).equal(logits_of(reference))


@pytest.mark.parametrize(("architecture", "format", "scheme", "count"), CASES)
def test_transformers_loads_it_without_being_told_how(
    architecture: str, format: str, scheme: str, count: int, written: Written
) -> None:
    folder, reference = written(architecture, format, scheme, count)
    model = from_stock(folder)
    logits_of(model)  # compressed-tensors unpacks at the first use
    assert different(model, reference) == []
