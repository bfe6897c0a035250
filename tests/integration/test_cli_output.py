"""What reaches a terminal: names as text, errors as lines, and results that can't be written as errors."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.command import Run
from octavo import cli
from octavo.cli_output import Spoken

E = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}
HOSTILE = "a\x1b]0;pwned\x07\x1b[31m\r\nall bytes equal.weight"
OCTAVO = (sys.executable, "-c", "import sys; sys.argv[0] = 'octavo'; from octavo.cli import main; main()")


def checkpoint(folder: Path, name: str = "m.x.weight") -> Path:
    folder.mkdir()
    header = json.dumps({name: E}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    return folder


@pytest.mark.parametrize("name", ["llama [fp16]", "a [b]", ":smile:", "x[bold red]"])
def test_names_with_brackets_are_shown_as_they_are(name: str, tmp_path: Path, run: Run) -> None:
    source, out = checkpoint(tmp_path / name), tmp_path / f"out {name}"
    planned = run("plan", source, "--checkpoint")
    assert (planned.code, planned.err) == (0, "")
    assert planned.out.splitlines()[0] == str(source)
    converted = run("convert", source, out)
    assert converted.code == 0
    assert f"written: {out}" in converted.out


def test_a_closing_tag_as_a_name_ends_nothing(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "a [")  # with the next part of the path, "a [/b]"
    checkpoint(tmp_path / "a [" / "b]")
    ended = run("convert", "a [/b]", "out")
    assert (ended.code, ended.out.splitlines()[0]) == (0, "a [/b]")


@pytest.mark.parametrize("against_itself", [False, True])
def test_a_tensor_s_name_says_nothing_of_its_own(against_itself: bool, tmp_path: Path, run: Run) -> None:
    source, out = checkpoint(tmp_path / "source", HOSTILE), tmp_path / "out"
    assert run("convert", source, out).code == 0
    ended = run("verify", out, "--against", out if against_itself else source)
    assert ended.code == (2 if against_itself else 0)
    assert ended.out.splitlines().count("all bytes equal") == (0 if against_itself else 1)
    others = (run("plan", source, "--checkpoint"), run("plan", source, "--checkpoint", "-i", "nothing"))
    for said in (ended, *others):
        assert (said.out + said.err).replace("\n", "").isprintable()
    data = json.loads(run("plan", source, "--checkpoint", "--json").out)
    assert [tensor["name"] for tensor in data["tensors"]] == [HOSTILE]


def test_half_a_surrogate_pair_is_refused_before_anything_is_written(tmp_path: Path, run: Run) -> None:
    ended = run("convert", checkpoint(tmp_path / "source", "m.\ud800.weight"), tmp_path / "out")
    assert ended.code == 2
    assert r"tensor 'm.\ud800.weight': its name is no Unicode text" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_wrong_usage_is_told_as_it_can_be_shown(run: Run) -> None:
    ended = run("demo", "--plot", "a\u202eb\x1b[2J/x/y.png")
    assert ended.code == 2
    assert r"a\u202eb\x1b[2J" in ended.err
    assert "\x1b[2J" not in ended.err


def process(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **options.pop("env", {})}
    return subprocess.run([*OCTAVO, *map(str, args)], text=True, env=environment, stderr=subprocess.PIPE, **options)


def test_characters_that_a_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "Gewürz", "重み.weight")
    done = process("plan", source, "--checkpoint", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u91cd\u307f" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_result_that_cannot_be_written_is_no_no(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    with open("/dev/full", "w") as full:
        done = process("plan", source, "--checkpoint", stdout=full)
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["table", "json"])
def test_a_conversion_whose_report_cannot_be_written_is_complete(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open("/dev/full", "w") as full:
        done = process("convert", checkpoint(tmp_path / "source"), out, *options, stdout=full)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"{out} is complete",
        "error: standard output: No space left on device",
    ]


_WHAT_IS_OPEN = """
import os, pathlib, sys
from octavo.cli import main
try:
    main()
finally:
    found = pathlib.Path("found")
    found.write_text(" ".join(os.readlink(f"/proc/self/fd/{number}") for number in range(3)))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs a system that tells what is open")
def test_no_file_takes_the_place_of_a_standard_stream_that_is_closed(tmp_path: Path) -> None:
    """What a library prints would be in it."""
    checkpoint(tmp_path / "source")
    command = [sys.executable, "-c", _WHAT_IS_OPEN, "convert", "source", "out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    assert subprocess.run(shell, cwd=tmp_path, env=environment).returncode == 2  # nobody got the report
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "found").read_text() == "/dev/null /dev/null /dev/null"


def test_a_reader_who_goes_away_is_no_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = process("plan", checkpoint(tmp_path / "source"), "--checkpoint", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_fault_of_octavo_says_that_it_is_one(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from octavo import api

    def fail(*_: Any, **__: Any) -> None:
        raise KeyError(HOSTILE)

    monkeypatch.setattr(api, "plan", fail)
    ended = run("plan", tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert "Traceback" in ended.err
    assert "this is a fault of octavo, not of what it was given" in ended.err.splitlines()[-1]
    assert ended.err.replace("\n", "").isprintable()
    assert cli.main


def test_what_a_model_says_obeys_no_terminal_but_reaches_programs_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal, said in ((False, "a\x1b[2J\nb"), (True, "a\\x1b[2J\nb")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal, raising=False)
        Spoken().write("a\x1b[2J\nb")
        assert capsys.readouterr().out == said
