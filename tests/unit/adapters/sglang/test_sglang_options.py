"""What users say to the SGLang plugin; needs no SGLang."""

from __future__ import annotations

import subprocess
import sys

import pytest

from octavo.adapters.sglang.offered import refused_by
from octavo.adapters.sglang.options import Options
from octavo.errors import RecipeError


def test_nothing_said_means_compressed_tensors_in_the_scheme_of_the_source():
    options = Options.of(None)
    assert options == Options.of("") == Options.of("{}") == Options.of({})
    assert (options.scheme, options.format, options.draft) == ("auto", None, None)


def test_what_is_said_may_be_a_text_or_what_it_means():
    extra = {"scheme": "fp8_block", "format": "fp8", "ignore": ["*.o_proj"], "threads": 2}
    options = Options.of('{"scheme": "fp8_block", "format": "fp8", "ignore": ["*.o_proj"], "threads": 2}')
    assert options == Options.of(extra) == Options.of({**extra, "scheme": "fp8_block"}, "octavo_fp8_block")
    assert (options.scheme, options.format, options.ignore) == ("fp8_block", "fp8", ("*.o_proj",))


def test_a_draft_stays_unless_it_has_a_scheme_of_its_own():
    assert Options.of({"ignore": ["*.o_proj"]}).for_draft() is None
    draft = Options.of({"draft": "fp8_block", "ignore": ["*.o_proj"]}).for_draft()
    assert draft is not None
    assert (draft.scheme, draft.ignore) == ("fp8_block", ())


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ("{", "is no JSON"),
        ("extra.json", "not a file's name; 'extra.json' was given"),
        ('{"scheme": "fp8_block", "threads": 2, "scheme": "fp8_channel"}', "'scheme' is given twice"),
        ("[1]", "must be a JSON object"),
        ('{"shceme": "fp8_block"}', "unknown key 'shceme'"),
        ('{"format": "gguf"}', "unknown format 'gguf'"),
        ('{"format": 3}', "format must be the name of a format"),
        ('{"format": "fp8", "scheme": "fp8_channel"}', "the format 'fp8' has no fp8_channel, only fp8_block"),
        ('{"scheme": "mxfp8"}', "mxfp8 is not offered in SGLang: few of its kernels take it"),
        ('{"draft": "mxfp8"}', "mxfp8 is not offered in SGLang"),
        ('{"draft": "fp9"}', "unknown scheme 'fp9'; offered in SGLang: fp8_channel, fp8_block, int8_channel"),
        ('{"draft": "auto"}', "unknown scheme 'auto'"),
        ('{"format": "fp8", "scheme": "fp8_block", "draft": "fp8_channel"}', "has no fp8_channel"),
    ],
)
def test_what_cant_be_meant_is_refused(extra, problem):
    with pytest.raises(RecipeError, match=problem):
        Options.of(extra)


def test_nvfp4_is_refused_where_this_sglang_has_nothing_that_reads_it(tmp_path):
    assert "nvfp4" in refused_by(tmp_path)
    scheme = tmp_path / "srt/layers/quantization/compressed_tensors/schemes/compressed_tensors_w4a16_nvfp4.py"
    scheme.parent.mkdir(parents=True)
    scheme.touch()
    assert refused_by(tmp_path).keys() == refused_by(None).keys() == {"fp8_tensor", "mxfp8"}


def test_what_every_process_of_sglang_asks_is_light():
    code = "import sys, octavo.adapters.sglang.offered; print('torch' in sys.modules, 'octavo.planning' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.split() == ["False", "False"]
