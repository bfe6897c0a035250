"""Models that draft for another one: by a layer of its checkpoint, or with a checkpoint of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.sglang_loading import Job, load, octavo_job
from helpers.vllm_checkpoints import convert, make, with_mtp

pytestmark = [
    pytest.mark.peers,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("sglang_loads"),
]
#: of which SGLang takes the target's, so that drafts may leave them as they are made
SHARED = {"lm_head.weight", "model.embed_tokens.weight"}


def test_a_layer_of_the_checkpoint_drafts_in_its_scheme(tmp_path: Path) -> None:
    source = with_mtp(make("glm4_moe", tmp_path / "bf16"), copies=False)
    step = [["draft"]]
    mine, stock, wide = load(
        octavo_job(source, steps=step), Job(convert(source, "fp8_channel"), steps=step), Job(source, steps=step)
    )
    for answer in (mine, stock, wide):
        assert not answer.error, answer.error
    draft, converted, plain = ({n: d for n, d in a.results[0].items() if n not in SHARED} for a in (mine, stock, wide))
    # SGLang has it in bf16, and takes the numbers of the conversion, which did not ask, for weights
    joined = "model.eh_proj.weight"
    assert draft.pop(joined) == plain.pop(joined) != converted.pop(joined)
    assert draft == converted
    assert sum("float8_e4m3fn" in digest for digest in draft.values()) == 6


def test_a_draft_of_its_own_stays_unless_it_has_a_scheme(tmp_path: Path) -> None:
    source, own = make("llama", tmp_path / "target"), make("llama", tmp_path / "draft", seed=1)
    step = [["draft", str(own)]]
    flag = {"speculative_draft_model_quantization": "octavo_fp8_block"}
    stays, flagged, said, wide, converted = load(
        octavo_job(source, steps=step),
        octavo_job(source, steps=step, **flag),
        octavo_job(source, steps=step, extra={"draft": "fp8_block", "ignore": ["model.layers.0.*"]}),
        Job(own),
        Job(convert(own, "fp8_block")),
    )
    for answer in (stays, flagged, said, wide, converted):
        assert not answer.error, answer.error
    assert stays.results == [wide.served]
    assert flagged.results == said.results == [converted.served]
