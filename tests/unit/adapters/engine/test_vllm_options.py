"""What users say to the vLLM plugin; needs no vLLM."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from helpers import write_checkpoint
from helpers.coded import coding_of, encoded, write_coded
from octavo import Recipe
from octavo.adapters.engine.names import scheme_of_quantization
from octavo.adapters.vllm.options import Options
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.codings import Decoding
from octavo.errors import RecipeError


def test_nothing_said_leaves_the_scheme_to_the_source_and_means_the_usual_budget():
    options = Options.parse({})
    assert options == Options.parse(None) == Options.parse({"scheme": "auto"})
    assert (options.scheme, options.ignore, options.staging_bytes, options.strict) == (
        "auto",
        (),
        256 << 20,
        False,
    )


def test_what_is_said_becomes_a_recipe():
    options = Options.parse({"scheme": "fp8_block", "ignore": ["*.o_proj"], "staging_bytes": 1 << 22, "threads": 3})
    assert options.recipe == Recipe("fp8_block", ignore=["*.o_proj"])
    assert (options.staging_bytes, options.threads) == (1 << 22, 3)


def test_the_quantization_names_the_scheme():
    assert Options.parse({}, "octavo_fp8_block").scheme == "fp8_block"
    assert Options.parse({"scheme": "fp8_block"}, "octavo_fp8_block").scheme == "fp8_block"
    assert Options.parse({"scheme": "auto"}, "octavo_fp8_block").scheme == "fp8_block"
    assert Options.parse({}, "fp8").scheme == "auto"
    assert scheme_of_quantization("octavo_fp8_channel") == "fp8_channel"
    assert scheme_of_quantization("compressed-tensors") is None


@pytest.mark.parametrize(
    ("groups", "scheme"),
    [
        ((128, 128), "fp8_block"),
        ((1, None), "fp8_channel"),
        ((None, None), "fp8_channel"),  # has a scheme, which vLLM does not run
        ((64, 64), "fp8_channel"),
    ],
)
def test_a_source_that_is_quantized_already_keeps_its_scheme_if_vllm_runs_it(groups, scheme, tmp_path):
    coding = coding_of("up.weight", (256, 256), Decoding("float8", *groups))
    checkpoint, _ = write_coded(tmp_path, {"up.weight": (coding, encoded(coding, 0))})
    options, remark = Options.parse({"threads": 2}).settled(checkpoint)
    assert (options.scheme, options.threads) == (scheme, 2)
    assert (remark is None) == (scheme == "fp8_channel")
    if remark:
        assert "it stays so (fp8_block)" in remark
    named = Options.parse({"scheme": "fp8_block"})
    assert named.settled(checkpoint) == (named, None)


def test_a_source_in_bf16_becomes_channels(tmp_path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {"up.weight": torch.ones(4, 4).bfloat16()}))
    assert Options.parse({}).settled(checkpoint) == (Options.parse({"scheme": "fp8_channel"}), None)


def test_threads_may_be_left_to_octavo():
    assert Options.parse({"threads": None}).threads is None


@pytest.mark.parametrize(
    ("extra", "quantization", "text"),
    [
        (
            {"sheme": "fp8_block"},
            None,
            "unknown key 'sheme'; known: scheme, format, ignore, staging_bytes, threads, strict",
        ),
        ([], None, r"must be a JSON object, not \[\]"),
        ({"scheme": "fp8_block"}, "octavo_fp8_channel", "contradict each other"),
        ({"scheme": "fp8_tensor"}, None, "Use fp8_channel or fp8_block or int8_channel or nvfp4"),
        ({"scheme": "mxfp8"}, None, "Use fp8_channel or fp8_block or int8_channel or nvfp4"),
        ({}, "octavo_mxfp8", "Use fp8_channel or fp8_block or int8_channel or nvfp4"),
        ({"scheme": "fp4"}, None, "unknown scheme 'fp4'"),
        ({"ignore": "lm_head"}, None, "must be a list of patterns, not 'lm_head'"),
        ({"ignore": ["re:("]}, None, "is no regular expression"),
        ({"staging_bytes": "1GB"}, None, "staging_bytes must be a number of bytes, not '1GB'"),
        ({"staging_bytes": True}, None, "staging_bytes must be a number of bytes, not True"),
        ({"staging_bytes": 0}, None, "staging_bytes must be a number of bytes, not 0"),
        ({"threads": "4"}, None, "threads must be a number, at least 1, not '4'"),
        ({"threads": 2.5}, None, "threads must be a number, at least 1, not 2.5"),
        ({"threads": True}, None, "threads must be a number, at least 1, not True"),
        ({"scheme": ["fp8_block"]}, None, r"scheme must be the name of a scheme, not \['fp8_block'\]"),
        ({"scheme": None}, "octavo_fp8_block", "scheme must be the name of a scheme, not None"),
        ({"ignore": None}, None, "ignore must be a list of patterns, not None"),
        ({"ignore": ["*.o_proj", 3]}, None, "ignore must be a list of patterns, not"),
        ({"strict": "yes"}, None, "strict must be true or false, not 'yes'"),
    ],
)
def test_what_makes_no_sense_is_an_error(extra, quantization, text):
    with pytest.raises(RecipeError, match=text):
        Options.parse(extra, quantization)


def test_the_plugin_is_harmless_where_there_is_no_vllm():
    code = """
import sys
sys.modules["vllm"] = None  # as if it were not installed
import octavo.adapters.vllm as plugin
assert plugin.register() is None
print(sorted(name for name in sys.modules if name.startswith("vllm.")))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("extra", "layout"),
    [
        ({"scheme": "fp8_channel"}, "compressed-tensors"),
        ({"scheme": "int8_channel"}, "compressed-tensors-w8a8"),
        ({"scheme": "int8_channel", "format": "compressed-tensors-w8a8"}, "compressed-tensors-w8a8"),
        ({"scheme": "int8_channel", "format": "compressed-tensors"}, "compressed-tensors"),
        ({"scheme": "nvfp4", "format": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_vllm_is_told_of_a_format(extra, layout):
    assert Options.parse(extra).layout.name == layout


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"format": "gguf"}, "unknown format 'gguf'"),
        ({"format": 3}, "format must be the name of a format, not 3"),
        ({"scheme": "fp8_channel", "format": "compressed-tensors-w8a8"}, "has no fp8_channel, only int8_channel"),
        ({"scheme": "fp8_block", "format": "fp8"}, "the format 'fp8' of fp8_block is not offered in vLLM"),
    ],
)
def test_another_format_is_refused(extra, problem):
    with pytest.raises(RecipeError, match=problem):
        Options.parse(extra)


def test_a_format_has_to_fit_the_scheme_that_the_source_has(tmp_path):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, {"up.weight": torch.ones(4, 4).bfloat16()}))
    options = Options.parse({"format": "compressed-tensors-w8a8"})
    with pytest.raises(RecipeError, match="has no fp8_channel, only int8_channel"):
        options.settled(checkpoint)
