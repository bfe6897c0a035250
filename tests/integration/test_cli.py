"""The command line as a whole: help, wrong usage, what it prints where, and the exit codes that scripts rely on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import octavo
from helpers.command import Run, only_json, refused
from octavo import cli
from octavo.conversion import formats
from octavo.numerics import schemes
from octavo.streaming.meter import ProgressLines

COMMANDS = ("plan", "convert", "verify", "generate", "demo")


# -- help -------------------------------------------------------------------------------------------------------------


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_what_a_command_is_for(command: str, flag: str, run: Run) -> None:
    ended = run(command, flag)
    assert (ended.code, ended.err) == (0, "")
    text = plain(ended.out)
    assert "Usage:" in text
    first_line = getattr(cli, command).__doc__.splitlines()[0]
    assert " ".join(first_line.split()[:6]) in text
    if command != "demo":
        assert re.search(rf"octavo {command} [\w-]+.*Qwen/|octavo {command} Qwen/", text)  # an example to copy


def _parameters(command: str) -> list[Any]:
    import typer

    return list(typer.main.get_command(cli.app).commands[command].params)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command: str) -> None:
    unexplained = {parameter.name for parameter in _parameters(command) if not getattr(parameter, "help", None)}
    assert unexplained == set()


@pytest.mark.parametrize("command", ["plan", "convert", "generate"])
def test_help_lists_all_schemes(command: str, run: Run) -> None:
    text = plain(run(command, "--help").out)
    assert all(scheme in text for scheme in schemes.SCHEMES)


@pytest.mark.parametrize("command", ["plan", "verify"])
def test_help_tells_the_exit_code_that_means_no(command: str, run: Run) -> None:
    assert "Exit code 1 when" in plain(run(command, "--help").out)


def test_help_lists_every_command(run: Run) -> None:
    ended = run("--help")
    assert ended.code == 0
    assert all(command in ended.out for command in COMMANDS)


def test_help_gives_an_example_of_every_command_the_exit_codes_and_where_to_go_on(run: Run) -> None:
    text = " ".join(plain(run("--help").out).split())
    assert all(f" octavo {command} " in text for command in COMMANDS)
    assert re.search(r"Exit codes: 0 .*; 1 .*; 2 .*; 130 interrupted", text)
    assert "help(octavo.load)" in text


@pytest.mark.parametrize("command", ["plan", "convert"])
def test_help_lists_all_formats(command: str, run: Run) -> None:
    text = plain(run(command, "--help").out)
    assert all(name in text for name in formats.NAMES)


def test_no_command_at_all_shows_the_help(run: Run) -> None:
    ended = run()
    assert ended.code == 2
    assert "convert" in ended.out + ended.err


def test_version_is_the_package_s(run: Run) -> None:
    assert run("--version") == (0, f"octavo {octavo.__version__}\n", "")
    module = subprocess.run([sys.executable, "-m", "octavo", "--version"], capture_output=True, text=True)
    assert (module.returncode, module.stdout) == (0, f"octavo {octavo.__version__}\n")


# -- completion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("octavo conv", ["convert"]),
        ("octavo plan --sch", ["--scheme"]),
        ("octavo plan x --scheme fp8_", ["fp8_channel", "fp8_block", "fp8_tensor"]),
        ("octavo demo -s n", ["nvfp4", "none"]),
        ("octavo convert x y --format f", ["fp8"]),
    ],
)
def test_completion_offers_commands_options_and_what_can_be_chosen(line: str, offered: list[str]) -> None:
    asked = {"_OCTAVO_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    command = [sys.executable, "-c", REFUSING.format(refused="torch transformers")]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(**asked))
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, offered, "")


def test_completion_is_installed_for_a_shell(tmp_path: Path) -> None:
    environment = _environment(HOME=str(tmp_path), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    command = [*OCTAVO, "--install-completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "octavo" in (tmp_path / ".bashrc").read_text()


# -- wrong usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["plan", "/no/such/folder"], ["/no/such/folder: no such file or folder"]),
        (["convert", "/no/such/folder", "/tmp/never"], ["/no/such/folder: no such file or folder"]),
        (["verify", "/no/such/folder", "--against", "/none"], ["/no/such/folder: no such file or folder"]),
        (["generate", "/no/such/folder", "-p", "x"], ["/no/such/folder: no such file or folder"]),
        (["plan"], ["Missing argument"]),
        (["convert", "/no/such/folder"], ["Missing argument"]),
        (["generate", "/no/such/folder"], ["Missing option", "--prompt"]),
        (["verify"], ["Missing argument"]),
        (["bake", "x"], ["No such command 'bake'"]),
        (["plan", "x", "--bake"], ["No such option", "--bake"]),
        (["generate", "x", "-p", "y", "-n", "0"], ["--max-new-tokens"]),
        (["convert", "x", "y", "--threads", "many"], ["--threads"]),
    ],
)
def test_wrong_usage_exits_2_with_a_message_on_stderr(args: list[str], parts: list[str], run: Run) -> None:
    refused(run(*args), *parts)


@pytest.mark.parametrize("command", ["plan", "convert", "generate", "demo"])
def test_unknown_scheme_lists_the_known_ones(command: str, llama: Path, tmp_path: Path, run: Run) -> None:
    arguments = {"plan": [llama], "convert": [llama, tmp_path / "out"], "generate": [llama, "-p", "x"], "demo": []}
    refused(run(command, *arguments[command], "--scheme", "int4"), "'int4'", *schemes.SCHEMES, "none")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["banana", "", "1.2.3GiB", "-5GiB", "5 potatoes", "GiB", "1e9", "0x10"])
@pytest.mark.parametrize("option", ["--staging", "--device-memory"])
def test_text_that_is_no_size_is_refused(option: str, size: str, llama: Path, run: Run) -> None:
    refused(run("plan", llama, "--checkpoint", f"{option}={size}"), repr(size), "write 256MiB, 24GiB or 80GB")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("12B", 12),
        ("1KB", 1000),
        ("1k", 1000),
        ("1KiB", 1024),
        ("256MiB", 256 << 20),
        ("1.5GiB", 3 << 29),
        ("80GB", 80 * 10**9),
        (" 2 TiB ", 2 << 40),
        ("24gib", 24 << 30),
    ],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert cli.parse_size(text) == size


def test_too_small_a_staging_budget_is_refused(llama: Path, tmp_path: Path, run: Run) -> None:
    refused(run("convert", llama, tmp_path / "out", "--staging", "64KiB"), "1 MiB")
    assert not (tmp_path / "out").exists()


def test_text_in_brackets_is_printed_as_it_is(run: Run) -> None:
    refused(run("plan", "/no/[red]such[/red]"), "/no/[red]such[/red]")


# -- as a process of its own ------------------------------------------------------------------------------------------


OCTAVO = (sys.executable, "-c", "import sys; sys.argv[0] = 'octavo'; from octavo.cli import main; main()")


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **more}


def _process(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*OCTAVO, *map(str, args)], capture_output=True, text=True, env=_environment())


WITHOUT = "torch transformers numpy safetensors huggingface_hub pydantic rich"
REFUSING = """
import sys
for name in {refused!r}.split():
    sys.modules[name] = None  # importing it is an error
sys.argv[0] = "octavo"
from octavo.cli import main
main()
"""


@pytest.mark.parametrize(
    ("args", "code", "said", "pretty"),
    [
        (["--version"], 0, "octavo ", False),
        (["--help"], 0, "Where to begin", True),
        (["plan", "--help"], 0, "--device-memory", True),
        (["bake"], 2, "No such command", False),
        (["plan", "x", "--bake"], 2, "No such option", False),
    ],
)
def test_what_can_be_said_at_once_waits_for_no_import(args: list[str], code: int, said: str, pretty: bool) -> None:
    refused = WITHOUT.replace(" rich", "") if pretty else WITHOUT
    command = [sys.executable, "-c", REFUSING.format(refused=refused), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == code, done.stderr
    assert said in plain(done.stdout + done.stderr)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["plan"], "Missing argument"),
        (["plan", "x", "--scheme", "int4"], "known: fp8_channel"),
        (["convert", "x", "y", "--staging", "much"], "'much' is not a size"),
        (["convert", "x", "y", "--staging", "9" * 400 + "TiB"], "is more than any machine has"),
        (["demo", "--plot", "/no/such/folder/a.png"], "does not exist"),
    ],
)
def test_wrong_usage_is_told_before_torch_is_imported(args: list[str], said: str) -> None:
    command = [sys.executable, "-c", REFUSING.format(refused="torch transformers"), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert done.returncode == 2
    assert said in done.stderr


def test_process_prints_json_to_stdout_and_nothing_to_stderr(llama: Path, tmp_path: Path) -> None:
    done = _process("convert", llama, tmp_path / "out", "--json", "--no-prove")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["in_memory"] is False


def test_process_exits_2_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    done = _process("plan", tmp_path, "--checkpoint")
    assert (done.returncode, done.stdout) == (2, "")
    assert "5 bytes long" in done.stderr
    assert "Traceback" not in done.stderr


def _all_of(terminal: int) -> str:
    """What a process writes to a terminal until it ends."""
    found = b""
    with contextlib.suppress(OSError):  # of a terminal that nobody has open any more
        while read := os.read(terminal, 1 << 16):
            found += read
    return found.decode(errors="replace")


def test_progress_bar_appears_on_a_terminal_only(
    llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stderr is a terminal of its own here; stdout holds nothing but JSON."""
    import pty

    leader, follower = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with ThreadPoolExecutor(1) as pool:  # what nobody reads would hold the command up
        everything = pool.submit(_all_of, leader)
        with open(follower, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            ended = run("convert", llama, tmp_path / "out", "--json")
        shown = everything.result()
    os.close(leader)
    assert ended.code == 0
    assert only_json(ended)["final_bytes"]
    assert "asking readers" in shown
    assert "Converting" in shown


def test_a_log_without_a_terminal_hears_of_progress_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    quiet, talkative = ProgressLines("Converting"), ProgressLines("Converting", every_s=0)
    for lines in (quiet, talkative):
        lines(1 << 20, 4 << 20)
    assert capsys.readouterr().err == "Converting: 1.00 MiB of 4.00 MiB\n"
