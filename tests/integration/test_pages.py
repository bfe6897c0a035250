"""Every code block of README and of the documentation runs, with small models in the place of those that it names.

Blocks of a page run in order and share their names. One that says what it needs (``title="needs a GPU"``) is compiled,
and what it asks of octavo, of the command line and of make is compared with what they take.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
from _models import make_checkpoint

import octavo
from helpers import pages
from helpers.models import add_tokenizer
from octavo import cli
from octavo.adapters.engine import names
from octavo.adapters.engine.options import Options
from octavo.adapters.sglang.options import Options as SGLangOptions
from octavo.adapters.vllm.options import Options as VllmOptions

NAMED = re.compile(r"Qwen/Qwen3[\w.-]*|facebook/opt-125m|meta-llama/[\w.-]+|path/to/model")
EXTRAS = re.compile(r"^octavo(\[(?P<extras>[\w,]+)\])?$")
BLOCKS = {page: pages.blocks(page) for page in pages.pages()}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with experts and a tokenizer, in one file; not to be changed."""
    folder = make_checkpoint("qwen2_moe", tmp_path_factory.mktemp("pages") / "model")
    add_tokenizer(folder, 260)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _pages_with(language: str) -> list[str]:
    return [page for page, found in BLOCKS.items() if any(block.language == language for block in found)]


def test_blocks_are_of_languages_that_are_tested():
    found = {block.language for every in BLOCKS.values() for block in every}
    assert found <= {"python", "sh", "text"}


# -- Python -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", _pages_with("python"))
def test_python_of_a_page_runs(page: str, model: Path, here: Path) -> None:
    pytest.importorskip("matplotlib")
    names: dict[str, Any] = {"__name__": "page"}
    for block in (block for block in BLOCKS[page] if block.language == "python"):
        # as many empty lines before it as make a traceback name the line of the page
        code = compile("\n" * (block.line - 1) + NAMED.sub(str(model), block.code), block.page, "exec")
        if block.needs is None:
            exec(code, names)
        else:
            check_calls(block)


@pytest.mark.parametrize("name", octavo.__all__)
def test_examples_of_a_docstring_run(name: str, model: Path, here: Path) -> None:
    names: dict[str, Any] = {"__name__": "docstring", "octavo": octavo}
    documented = getattr(octavo, name)
    methods = [value for key, value in vars(documented).items() if inspect.isfunction(value) and key[0] != "_"]
    for each in (documented, *(methods if inspect.isclass(documented) else ())):
        for block in pages.docstring_blocks(name, each.__doc__ or ""):
            exec(compile(NAMED.sub(str(model), block.code), f"docstring of {name}", "exec"), names)


def check_calls(block: pages.Block) -> None:
    """Compare what a block asks of octavo, and of engines with octavo in them, with what they take."""
    for node in ast.walk(ast.parse(block.code)):
        if not isinstance(node, ast.Call):
            continue
        called, given = node.func, {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "octavo":
            inspect.signature(getattr(octavo, called.attr)).bind(*node.args, **given)
        elif options := ENGINES.get(ast.unparse(called)):
            known = {name: ast.literal_eval(value) for name, value in given.items()}
            asked = (known.get(name) for name in ("load_format", "quantization", "model_loader_extra_config"))
            check_engine(options, *asked)


def check_engine(options: type[Options], load_format: str | None, quantization: str | None, extra: Any) -> None:
    assert load_format in (None, names.LOAD_FORMAT)
    scheme = names.scheme_of_quantization(quantization)
    assert quantization is None or scheme in names.SCHEMES
    assert load_format or scheme, "octavo is not asked for"
    options.parse(extra, quantization)


ENGINES: dict[str, type[Options]] = {"LLM": VllmOptions, "sglang.Engine": SGLangOptions}


# -- shell ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", _pages_with("sh"))
def test_shell_of_a_page_runs(page: str, model: Path, here: Path, run: Callable[..., Any]) -> None:
    for block in (block for block in BLOCKS[page] if block.language == "sh"):
        for words in pages.commands(block):
            if words[0] == "octavo" and block.needs is None:
                ended = run(*(NAMED.sub(str(model), word) for word in words[1:]))
                assert ended.code == 0, f"{block.place}: {words}: {ended.err}"
            else:
                CHECKS[words[0]](words[1:])


def check_octavo(words: list[str]) -> None:
    command: Any = typer.main.get_command(cli.app)
    command.commands[words[0]].make_context(words[0], words[1:])


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
    for word in words[1:]:
        if match := EXTRAS.match(word):
            asked = match["extras"].split(",") if match["extras"] else []
            assert set(asked) <= project["optional-dependencies"].keys(), word
        else:
            assert re.fullmatch(r"[\w-]+", word), word


def check_make(words: list[str]) -> None:
    """The targets are there; a benchmark too, with the options that it is given."""
    targets = {word for word in words if re.fullmatch(r"[\w-]+", word)}
    known = set(re.findall(r"^([\w-]+):", (pages.ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= known, targets - known
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if "B" in given:
        text = "".join(
            (pages.ROOT / "benchmarks" / f"{name}.py").read_text() for name in (given["B"], "common", "make_checkpoint")
        )
        for option in re.findall(r"--[\w-]+", given.get("ARGS", "")):
            assert f'"{option}"' in text, option


def check_serve(kind: type[Options]) -> Callable[[list[str]], None]:
    def check(words: list[str]) -> None:
        assert words[0] == "serve"
        check_engine_options(kind, words[1:])

    return check


def check_engine_options(kind: type[Options], words: list[str]) -> None:
    """What octavo makes of the options that concern it; all options go through vLLM's own parser in the peer tests."""
    options: dict[str, str] = {}
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, has_value, value = word.partition("=")
        options[name] = value if has_value else after
    extra = options.get("--model-loader-extra-config")
    check_engine(kind, options.get("--load-format"), options.get("--quantization"), extra and json.loads(extra))


def check_python(words: list[str]) -> None:
    path = pages.ROOT / words[0]
    compile(path.read_text(), words[0], "exec")
    if "vllm_generate" in words[0]:
        check_engine_options(VllmOptions, words[1:])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "octavo": check_octavo,
    "pip": check_pip,
    "make": check_make,
    "sglang": check_serve(SGLangOptions),
    "vllm": check_serve(VllmOptions),
    "python": check_python,
}
