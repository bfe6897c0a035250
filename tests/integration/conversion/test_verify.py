"""Verifying: each tensor of a conversion, its scheme and its error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _sources import CASES, CONFIG, by_case, is_quantized, source_tensors

import octavo
from helpers import write_checkpoint
from octavo.errors import CheckpointError
from octavo.numerics import schemes

pytestmark = pytest.mark.usefixtures("nothing_left_behind", "no_waiting_for_the_disk")


@by_case
def test_verify_reports_each_tensor_with_its_scheme_and_error(
    sources: Callable[[str], Path], format: str, scheme: str, tmp_path: Path
) -> None:
    octavo.convert(sources("sharded"), tmp_path / "out", scheme, format=format)
    report = octavo.verify(tmp_path / "out", sources("sharded"))
    tensors = source_tensors()
    assert {result.name for result in report.tensors} == set(tensors)
    for result in report.tensors:
        assert result.equal
        quantized = is_quantized(result.name, tensors[result.name], format, scheme)
        # of one row and fewer than 128 columns, a block is a row: its scale does not tell which it was
        alike = {"fp8_channel", "fp8_block"} if tensors[result.name].shape[0] == 1 else set()
        assert result.scheme == (scheme if quantized else None) or {scheme, result.scheme} <= alike
        if not quantized:
            assert result.error_db is None
            continue
        q, scale = schemes.quantize(tensors[result.name], scheme)
        wanted = schemes.error_db(tensors[result.name], schemes.dequantize(q, scale, scheme))
        assert result.error_db == pytest.approx(wanted, abs=0.01)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_verify_works_block_by_block(
    sources: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.conversion.verify._BLOCK_ELEMENTS", 1 << 15)
    for format, scheme in CASES:
        octavo.convert(sources("single"), tmp_path / f"{format}-{scheme}", scheme, format=format)
        assert octavo.verify(tmp_path / f"{format}-{scheme}", sources("single")).ok


def test_verify_against_another_model_names_the_tensors(sources: Callable[[str], Path], tmp_path: Path) -> None:
    octavo.convert(sources("single"), tmp_path / "out")
    tensors = source_tensors()
    tensors["model.extra.weight"] = tensors.pop("lm_head.weight")
    tensors["model.embed_tokens.weight"] = torch.zeros(5, 5, dtype=torch.bfloat16)
    other = write_checkpoint(tmp_path / "other", tensors, 1, CONFIG)
    with pytest.raises(CheckpointError) as caught:
        octavo.verify(tmp_path / "out", other)
    for part in (
        "lm_head.weight: not in",
        "model.extra.weight: in",
        "model.embed_tokens.weight: [96, 256] here, [5, 5]",
    ):
        assert part in str(caught.value)
