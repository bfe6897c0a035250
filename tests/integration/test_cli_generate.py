"""`octavo generate`: an answer alone, or as JSON with a report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import make_checkpoint
from safetensors.torch import load_file

from helpers import write_checkpoint
from helpers.command import Run, only_json, refused


def test_generate_prints_the_answer_alone(llama: Path, run: Run) -> None:
    ended = run("generate", llama, "--prompt", "hello", "--max-new-tokens", 6)
    assert (ended.code, ended.err) == (0, "")
    again = run("generate", llama, "--prompt", "hello", "-n", 6, "--raw", "--threads", 1, "--staging", "2MiB")
    assert again.out == ended.out  # greedy, and the bytes don't depend on threads


def test_generate_as_json_holds_the_answer_and_the_report(llama: Path, run: Run) -> None:
    printed = run("generate", llama, "--prompt", "hello", "-n", 6).out
    found = only_json(run("generate", llama, "--prompt", "hello", "-n", 6, "--json"))
    assert found["prompt"] == "hello"
    assert found["text"].strip() == printed.strip()
    assert found["load"]["quantized"]["fp8_channel"]["tensors"] == 14


def test_generate_unquantized_is_what_transformers_generates(llama: Path, run: Run) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = only_json(run("generate", llama, "-p", "abc", "-n", 5, "-s", "none", "--json"))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    ids = tokenizer("abc", return_tensors="pt")
    tokens = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert found["text"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_generate_without_a_tokenizer_says_so(tmp_path: Path, run: Run) -> None:
    folder = make_checkpoint("llama", tmp_path / "model")
    refused(run("generate", folder, "-p", "x"), str(folder), "no usable tokenizer")


def test_generate_by_a_prompt_of_no_token_says_so(llama: Path, run: Run) -> None:
    refused(run("generate", llama, "--prompt", "", "--raw"), str(llama), "it makes nothing of the prompt")


def test_generate_from_a_checkpoint_that_does_not_fit_its_config_exits_2(llama: Path, tmp_path: Path, run: Run) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.norm.weight"]
    config = json.loads((llama / "config.json").read_text())
    folder = write_checkpoint(tmp_path / "model", tensors, 1, config)
    refused(run("generate", folder, "-p", "x"), "model.norm.weight")


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        (
            "tokenizer_config.json",
            {"chat_template": "{{ raise_exception('no \x1b[2J') }}"},
            r"TemplateError: no \x1b[2J",
        ),
        ("tokenizer_config.json", {"chat_template": "{% for %}"}, "TemplateSyntaxError"),
        (
            "tokenizer_config.json",
            {"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"},
            "RecursionError",
        ),
        ("tokenizer_config.json", {"chat_template": "{{ '' }}"}, "its chat template makes nothing of the prompt"),
        ("generation_config.json", {"eos_token_id": "x"}, "generation_config.json: transformers can't generate by it"),
    ],
)
def test_what_a_checkpoint_asks_in_vain_is_an_error_of_it(
    llama: Path, tmp_path: Path, run: Run, file: str, changes: dict[str, Any], says: str
) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    before = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(before | changes))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    refused(run("generate", folder, "-p", "hello", "-n", 2), str(folder), says)


def test_beams_that_a_checkpoint_asks_for_take_no_memory(llama: Path, tmp_path: Path, run: Run) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 10**9, "return_dict_in_generate": True}))
    assert run("generate", folder, "-p", "hello", "-n", 2).code == 0
