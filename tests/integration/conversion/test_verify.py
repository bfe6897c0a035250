"""Verifying: each tensor of a conversion, its scheme and its error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _sources import CASES, CONFIG, by_case, is_quantized, source_tensors

import octavo
from helpers import random_weights, write_checkpoint
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


def test_verify_works_block_by_block(sources: Callable[[str], Path], tmp_path: Path) -> None:
    for format, scheme in CASES:
        octavo.convert(sources("single"), tmp_path / f"{format}-{scheme}", scheme, format=format, prove=False)
        reports = [
            octavo.verify(tmp_path / f"{format}-{scheme}", sources("single"), staging_bytes=staging, threads=threads)
            for staging, threads in ((1 << 20, 2), (1 << 20, None), (3_000_001, 3), (1 << 28, 1))
        ]
        for report in reports:
            assert report.ok
            for result, first in zip(report.tensors, reports[0].tensors, strict=True):
                assert result.error_db == pytest.approx(first.error_db, abs=1e-3)


def test_verify_takes_rows_that_are_wider_than_a_block(tmp_path: Path) -> None:
    shapes = {"a.up_proj.weight": (3, 40_000), "b.up_proj.weight": (130, 20_000), "c.up_proj.weight": (1, 70_001)}
    tensors = {name: random_weights(shape, torch.bfloat16, 1) for name, shape in shapes.items()}
    source = write_checkpoint(tmp_path / "source", tensors, 1, CONFIG)
    for scheme in schemes.SCHEMES:
        octavo.convert(source, tmp_path / scheme, scheme, prove=False)
        for result in octavo.verify(tmp_path / scheme, source, staging_bytes=1 << 20, threads=2).tensors:
            assert result.equal
            if result.scheme is None:  # mxfp8 wants a multiple of 32, nvfp4 of 16, packed int8 of 4
                assert result.name == "c.up_proj.weight"
                assert scheme in ("mxfp8", "nvfp4", "int8_channel")
                continue
            q, scale = schemes.quantize(tensors[result.name], scheme)
            wanted = schemes.error_db(tensors[result.name], schemes.dequantize(q, scale, scheme))
            assert result.error_db == pytest.approx(wanted, abs=0.01)


def test_verify_reports_progress_in_bytes_of_the_source(sources: Callable[[str], Path], tmp_path: Path) -> None:
    octavo.convert(sources("single"), tmp_path / "out", "fp8_tensor")
    told: list[tuple[int, int]] = []
    octavo.verify(tmp_path / "out", sources("single"), progress=lambda *both: told.append(both))
    nbytes = sum(tensor.nbytes for tensor in source_tensors().values())
    assert told[-1] == (nbytes, nbytes)
    assert told == sorted(told)


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
