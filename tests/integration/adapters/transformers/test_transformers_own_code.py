"""Checkpoints that bring code: without trust none of it runs or is copied, nobody is asked, and the error names it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers.dynamic_module_utils as dynamic

import octavo
from helpers.command import Run, refused
from octavo.adapters.transformers.chat import load_tokenizer
from octavo.errors import CheckpointError

Edit = Callable[[Path], None]
MARK = "was_run"


@pytest.fixture(autouse=True)
def willing_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Somebody answers yes to all questions; no test asks one, and the modules cache is the test's own."""
    answers = io.StringIO("y\n" * 99)
    monkeypatch.setattr("sys.stdin", answers)
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield
    assert answers.tell() == 0, "stdin was read"


def _edit(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(config | changes))


def _plant(source: Path, folder: Path, edit: Edit) -> Path:
    """A copy of a checkpoint with a module that leaves a mark when it is imported, and a config that names it."""
    shutil.copytree(source, folder)
    (folder / "planted.py").write_text(f"open({str(folder / MARK)!r}, 'w').close()\n")
    edit(folder)
    return folder


def _nothing_ran(folder: Path) -> None:
    assert not (folder / MARK).exists()
    assert not (folder.parent / "modules").exists()


def _tokenizer(auto_map: Any) -> Edit:
    return lambda folder: _edit(folder / "tokenizer_config.json", tokenizer_class="Unknown", auto_map=auto_map)


def _config(folder: Path) -> None:
    _edit(folder / "config.json", model_type="unknown", auto_map={"AutoConfig": "planted.C"})


def _model(folder: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "planted.M"}
    _edit(folder / "config.json", model_type="vit", architectures=["Unknown"], auto_map=auto_map)


def _part(folder: Path) -> None:
    """transformers builds this part with no word of whether code is trusted, and would ask."""
    part = {"model_type": "align_vision_model", "auto_map": {"AutoModel": "planted.M"}, "_name_or_path": str(folder)}
    names = ["LlavaForConditionalGeneration"]
    _edit(folder / "config.json", model_type="llava", architectures=names, vision_config=part)


BUILDS: dict[str, Edit] = {"a config": _config, "a model": _model, "a part of a model": _part}
TOKENIZERS: dict[str, tuple[Any, str]] = {
    "as a list": (["planted.T", None], "planted.py"),
    "for the fast one": ({"AutoTokenizer": [None, "planted.T"]}, "planted.py"),
    "of another repository": ({"AutoTokenizer": ["someone/else--planted.T", None]}, "planted.py of someone/else"),
}


@pytest.mark.parametrize("edit", BUILDS.values(), ids=BUILDS)
@pytest.mark.parametrize("do", [octavo.load, octavo.plan], ids=["load", "plan"])
def test_code_for_a_model_is_not_run(llama: Path, tmp_path: Path, do: Any, edit: Edit) -> None:
    folder = _plant(llama, tmp_path / "model", edit)
    with pytest.raises(CheckpointError, match=r"config\.json: needs code .*planted\.py.*trust_remote_code=True"):
        do(folder)
    _nothing_ran(folder)


@pytest.mark.parametrize("command", [("plan",), ("generate", "-p", "hello")], ids=["plan", "generate"])
def test_commands_do_not_run_code_for_a_model(llama: Path, tmp_path: Path, run: Run, command: tuple[str, ...]) -> None:
    folder = _plant(llama, tmp_path / "model", _config)
    refused(run(*command, folder), "config.json: needs code", "planted.py", "--trust-remote-code")
    _nothing_ran(folder)


@pytest.mark.parametrize(("auto_map", "named"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_generate_does_not_run_code_for_a_tokenizer(
    llama: Path, tmp_path: Path, run: Run, auto_map: Any, named: str
) -> None:
    folder = _plant(llama, tmp_path / "model", _tokenizer(auto_map))
    _edit(folder / "config.json", model_type="llama")
    found = run("generate", folder, "-p", "hello", "-n", 1)
    refused(found, "tokenizer_config.json: needs code", f"({named})", "--trust-remote-code")
    _nothing_ran(folder)


@pytest.mark.parametrize("trusted", [False, True])
def test_nobody_is_asked_about_code_for_a_tokenizer_within_a_tokenizer(
    llama: Path, tmp_path: Path, trusted: bool
) -> None:
    def edit(folder: Path) -> None:
        part = {"model_type": "llama"}
        _edit(folder / "config.json", model_type="rag", question_encoder=part, generator=part)
        _edit(folder / "tokenizer_config.json", tokenizer_class="RagTokenizer")
        inner = folder / "question_encoder_tokenizer"
        inner.mkdir()
        _edit(
            inner / "tokenizer_config.json", tokenizer_class="Unknown", auto_map={"AutoTokenizer": ["planted.T", None]}
        )

    folder = _plant(llama, tmp_path / "model", edit)
    with pytest.raises(CheckpointError, match=r"no usable tokenizer: .*trust_remote_code"):
        load_tokenizer(str(folder), trusted)
    _nothing_ran(folder)


def test_generate_fetches_no_code_for_ways_to_generate(llama: Path, tmp_path: Path, run: Run) -> None:
    folder = _plant(
        llama, tmp_path / "model", lambda folder: _edit(folder / "generation_config.json", dola_layers="low")
    )
    refused(run("generate", folder, "-p", "hello", "-n", 1), "generation_config.json", "trust_remote_code=True")
    _nothing_ran(folder)


def test_code_runs_for_whoever_trusts_it(llama: Path, tmp_path: Path, run: Run) -> None:
    folder = _plant(llama, tmp_path / "model", _tokenizer(["planted.T", None]))
    code = "from transformers import PreTrainedTokenizerFast\nclass T(PreTrainedTokenizerFast): ...\n"
    (folder / "planted.py").write_text((folder / "planted.py").read_text() + code)
    assert run("generate", folder, "-p", "hello", "-n", 1, "--trust-remote-code").code == 0
    assert (folder / MARK).exists()


def test_code_that_a_checkpoint_can_do_without_is_passed_over(llama: Path, tmp_path: Path, run: Run) -> None:
    def edit(folder: Path) -> None:
        _edit(folder / "config.json", auto_map={"AutoConfig": "planted.C", "AutoModelForCausalLM": "planted.M"})

    folder = _plant(llama, tmp_path / "model", edit)
    assert run("generate", folder, "-p", "hello", "-n", 1).code == 0
    _nothing_ran(folder)


def test_commands_that_build_nothing_run_nothing(llama: Path, tmp_path: Path, run: Run) -> None:
    folder = _plant(llama, tmp_path / "model", _config)
    assert run("convert", folder, tmp_path / "converted").code == 0
    assert run("verify", tmp_path / "converted", "--against", folder).code == 0
    assert run("plan", folder, "--checkpoint").code == 0
    refused(run("plan", folder, "--checkpoint", "--trust-remote-code"), "leave --checkpoint out")
    list(octavo.stream(folder))
    _nothing_ran(folder)


@pytest.mark.parametrize("where", ["the model", "a part"])
def test_kernels_that_a_config_names_are_not_fetched(llama: Path, tmp_path: Path, where: str) -> None:
    def edit(folder: Path) -> None:
        kernel = "someone/kernel"
        if where == "the model":
            _edit(folder / "config.json", attn_implementation=kernel)
        else:
            _edit(folder / "config.json", model_type="llava", attn_implementation={"vision_config": kernel})

    folder = _plant(llama, tmp_path / "model", edit)
    with pytest.raises(CheckpointError, match=r"code from the hub, the kernel someone/kernel"):
        octavo.load(folder)
    if where == "the model":
        assert octavo.load(folder, attn_implementation="eager").config._attn_implementation == "eager"


def test_pickled_weights_are_not_opened(llama: Path, tmp_path: Path) -> None:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    folder = _plant(llama, tmp_path / "model", edit)
    with pytest.raises(CheckpointError, match="is a pickle"):
        octavo.load(folder, trust_remote_code=True)
