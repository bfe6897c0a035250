"""The README's code runs, with a small model in the place of those that it names."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from _models import make_checkpoint

from octavo import cli

README = Path(__file__).parents[2] / "README.md"
NAMED = re.compile(r"Qwen/Qwen3-8B|path/to/model")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_checkpoint("qwen2_moe", tmp_path / "model")


@pytest.mark.parametrize("number", range(len(_blocks("python"))))
def test_python_of_the_readme_runs(number: int, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    code = NAMED.sub(str(model), _blocks("python")[number])
    names: dict[str, object] = {}
    if "octavo." in code and "import octavo" not in code:
        names["octavo"] = __import__("octavo")
    exec(compile(code, f"README block {number}", "exec"), names)
    assert number > 0 or Path("memory.png").read_bytes().startswith(b"\x89PNG")


def test_shell_of_the_readme_runs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = [shlex.split(line, comments=True) for block in _blocks("sh") for line in block.splitlines()]
    ours = [[NAMED.sub(str(model), word) for word in words[1:]] for words in commands if words[:1] == ["octavo"]]
    assert {words[0] for words in ours} == {"plan", "generate", "convert", "verify"}
    for words in ours:
        if words[0] == "generate":
            continue  # needs a tokenizer: see test_cli_generate
        monkeypatch.setattr("sys.argv", ["octavo", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, words
