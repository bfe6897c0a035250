"""The command line: what it prints where, and the exit codes that scripts rely on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from _models import make_checkpoint
from safetensors.torch import load_file

import octavo
from helpers import write_checkpoint
from helpers.models import add_tokenizer
from octavo import cli, schemes
from octavo.report import ProgressLines

COMMANDS = ("plan", "convert", "verify", "generate", "demo")


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command as its entry point does, in this process; whatever it prints is caught at the descriptors."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["octavo", *map(str, args)])
        capfd.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return Ended(code, out, err)

    return call


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer that knows every byte; not to be changed."""
    folder = make_checkpoint(
        "llama", tmp_path_factory.mktemp("llama") / "model", hidden_size=128, intermediate_size=200
    )
    add_tokenizer(folder, 260)
    return folder


@pytest.fixture(scope="session")
def converted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dst = tmp_path_factory.mktemp("converted") / "out"
    octavo.convert(llama, dst)
    return dst


def only_json(ended: Ended) -> Any:
    """What stdout holds: one JSON value and nothing else; and stderr holds nothing."""
    assert ended.err == ""
    assert ended.out.endswith("\n")
    return json.loads(ended.out, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def refused(ended: Ended, *parts: str) -> None:
    """Wrong usage or a user's error: exit code 2, a message on stderr that holds ``parts``, nothing else."""
    assert ended.code == 2
    assert ended.out == ""
    assert "Traceback" not in ended.err
    # click wraps lines within boxes
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", ended.err).split())
    for part in parts:
        assert part in text, ended.err


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


def test_no_command_at_all_shows_the_help(run: Run) -> None:
    ended = run()
    assert ended.code == 2
    assert "convert" in ended.out + ended.err


def test_version_is_the_package_s(run: Run) -> None:
    assert run("--version") == (0, f"octavo {octavo.__version__}\n", "")
    module = subprocess.run([sys.executable, "-m", "octavo", "--version"], capture_output=True, text=True)
    assert (module.returncode, module.stdout) == (0, f"octavo {octavo.__version__}\n")


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
        (["verify", "/no/such/folder"], ["Missing option", "--against"]),
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


# -- plan -------------------------------------------------------------------------------------------------------------


def test_plan_shows_what_becomes_of_the_weights_and_why(llama: Path, run: Run) -> None:
    ended = run("plan", llama)
    assert (ended.code, ended.err) == (0, "")
    for part in ("model.layers.*.self_attn.q_proj.weight", "fp8_channel", "embedding", "peak at most"):
        assert part in ended.out


@pytest.mark.parametrize("model", [True, False])
@pytest.mark.parametrize("scheme", [*schemes.SCHEMES, "none"])
def test_plan_as_json_is_the_plan(scheme: str, model: bool, llama: Path, run: Run) -> None:
    flags = [] if model else ["--checkpoint"]
    found = only_json(run("plan", llama, "--scheme", scheme, "--json", *flags))
    wanted = octavo.plan(llama, None if scheme == "none" else scheme, model=model).to_dict()
    assert found == json.loads(json.dumps(wanted))


def test_plan_honours_ignore_and_staging(llama: Path, run: Run) -> None:
    found = only_json(
        run("plan", llama, "--json", "-i", "*.self_attn.*", "--ignore", "re:.*mlp.*", "--staging", "8MiB")
    )
    assert {tensor["scheme"] for tensor in found["tensors"]} == {None}
    assert found["staging_bytes"] == 8 << 20


@pytest.mark.parametrize("as_json", [False, True])
def test_plan_says_that_it_fits(as_json: bool, llama: Path, run: Run) -> None:
    ended = run("plan", llama, "--device-memory", "24GiB", *(["--json"] if as_json else []))
    assert ended.code == 0
    if as_json:
        found = only_json(ended)
        assert found["fits"] is True
        assert found["device_memory_bytes"] == 24 << 30
    else:
        assert " fits into 24.00 GiB" in ended.out


@pytest.mark.parametrize("as_json", [False, True])
def test_plan_exits_1_when_it_does_not_fit(as_json: bool, llama: Path, run: Run) -> None:
    ended = run("plan", llama, "--device-memory", "1MiB", *(["--json"] if as_json else []))
    if as_json:
        assert only_json(ended)["fits"] is False
    else:
        assert " does not fit into 1.00 MiB" in ended.out
    assert ended.err == ""
    assert ended.code == 1


def test_plan_fits_exactly_at_its_own_peak(llama: Path, run: Run) -> None:
    peak = octavo.plan(llama).peak_bytes()
    assert only_json(run("plan", llama, "--json", "--device-memory", peak))["fits"] is True
    assert only_json(run("plan", llama, "--json", "--device-memory", peak - 1))["fits"] is False


def test_a_conversion_fits_where_its_model_does_not(llama: Path, run: Run) -> None:
    whole, staging = octavo.plan(llama, model=False).final_bytes(), 1 << 20
    options = ("--json", "--device-memory", max(whole, staging), "--staging", staging)
    assert only_json(run("plan", llama, *options))["fits"] is False
    assert only_json(run("plan", llama, *options, "--checkpoint"))["fits"] is True


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to ask")
def test_plan_for_the_device_s_own_memory_needs_a_device(llama: Path, run: Run) -> None:
    refused(run("plan", llama, "--device-memory", "auto"), "needs a GPU here")


def test_plan_for_a_device_that_is_not_here_works(llama: Path, run: Run) -> None:
    found = only_json(run("plan", llama, "--json", "--checkpoint", "--device", "cuda:3"))
    assert set(found["devices"]) == {"cuda:3"}


def test_a_format_is_for_planning_a_conversion(llama: Path, run: Run) -> None:
    refused(run("plan", llama, "--format", "fp8"), "--format is for planning a conversion: add --checkpoint")


def test_the_demo_looks_for_the_folder_of_its_picture_first(tmp_path: Path, run: Run) -> None:
    refused(run("demo", "--plot", tmp_path / "missing" / "a.png"), "does not exist")


def test_plan_names_a_pattern_that_matches_nothing(llama: Path, run: Run) -> None:
    refused(run("plan", llama, "--ignore", "model.layers.7"), "'model.layers.7' matches no tensor")


# -- convert and verify -----------------------------------------------------------------------------------------------


def test_convert_writes_and_reports(llama: Path, tmp_path: Path, run: Run) -> None:
    ended = run("convert", llama, tmp_path / "out", "--scheme", "fp8_block", "--format", "fp8", "--threads", "2")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.endswith(f"written: {tmp_path / 'out'}\n")
    for part in ("unquantized", "kept: embedding", "readers of the fp8 format"):
        assert part in ended.out
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_convert_as_json_is_the_report(llama: Path, tmp_path: Path, run: Run) -> None:
    found = only_json(run("convert", llama, tmp_path / "out", "--json", "--staging", "4MiB"))
    assert found["quantized"]["fp8_channel"]["tensors"] == 14
    assert found["staging_bytes"] <= 4 << 20
    assert found["source_bytes"] == octavo.plan(llama, model=False).source_bytes
    assert octavo.verify(tmp_path / "out", llama).ok


def test_convert_without_a_scheme_copies(llama: Path, tmp_path: Path, run: Run) -> None:
    assert run("convert", llama, tmp_path / "out", "-s", "none").code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (llama, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_convert_refuses_a_target_that_exists(llama: Path, tmp_path: Path, run: Run) -> None:
    refused(run("convert", llama, tmp_path), str(tmp_path), "exists already")
    refused(run("convert", llama, tmp_path, "--json"), "exists already")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--format", "gguf"], ["unknown format 'gguf'", "compressed-tensors, fp8"]),
        (["--format", "fp8"], ["has no fp8_channel, only fp8_block"]),
        (["--ignore", "nothing.like.it"], ["matches no tensor"]),
        (["--threads", "0"], ["at least 1"]),
    ],
)
def test_convert_refuses_what_it_can_t_honour(
    options: list[str], parts: list[str], llama: Path, tmp_path: Path, run: Run
) -> None:
    refused(run("convert", llama, tmp_path / "out", *options), *parts)
    assert not (tmp_path / "out").exists()


def test_convert_refuses_a_scheme_that_the_format_lacks_whatever_the_shapes(tmp_path: Path, run: Run) -> None:
    ragged = write_checkpoint(tmp_path / "ragged", {"a.up_proj.weight": torch.ones(200, 300).bfloat16()})
    refused(run("convert", ragged, tmp_path / "out", "--format", "fp8"), "has no fp8_channel, only fp8_block")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "banana"])
def test_convert_on_a_device_that_is_not_here_is_refused(device: str, llama: Path, tmp_path: Path, run: Run) -> None:
    refused(run("convert", llama, tmp_path / "out", "--device", device), device)


def test_verify_says_equal_and_how_large_the_error_is(llama: Path, converted: Path, run: Run) -> None:
    ended = run("verify", converted, "--against", llama)
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"model\.layers\.0\.mlp\.up_proj\.weight  fp8_channel  equal  3\d\.\d\d dB", ended.out)
    assert ended.out.endswith("all bytes equal\n")


def test_verify_as_json_lists_every_tensor(llama: Path, converted: Path, run: Run) -> None:
    found = only_json(run("verify", converted, "--against", llama, "--json"))
    assert found["ok"] is True
    assert {tensor["name"] for tensor in found["tensors"]} == set(load_file(llama / "model.safetensors"))


@pytest.mark.parametrize("as_json", [False, True])
def test_verify_exits_1_when_a_byte_differs(as_json: bool, llama: Path, tmp_path: Path, run: Run) -> None:
    octavo.convert(llama, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    ended = run("verify", tmp_path / "out", "--against", llama, *(["--json"] if as_json else []))
    if as_json:
        assert only_json(ended)["ok"] is False
    else:
        assert "DIFFERENT: 1 tensors" in ended.out
    assert ended.code == 1


def test_verify_against_another_model_exits_2(converted: Path, tmp_path: Path, run: Run) -> None:
    other = write_checkpoint(tmp_path / "other", {"alien.weight": torch.ones(2, 2)})
    refused(run("verify", converted, "--against", other), "alien.weight", "Was it made from")


# -- generate and demo ------------------------------------------------------------------------------------------------


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


def test_generate_from_a_checkpoint_that_does_not_fit_its_config_exits_2(llama: Path, tmp_path: Path, run: Run) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.norm.weight"]
    config = json.loads((llama / "config.json").read_text())
    folder = write_checkpoint(tmp_path / "model", tensors, 1, config)
    refused(run("generate", folder, "-p", "x"), "model.norm.weight")


def test_demo_shows_the_curve_and_compares(
    llama: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo import demo

    monkeypatch.setattr(demo, "prepare", lambda progress=None: llama)
    monkeypatch.setattr(demo, "EVAL_TEXT", demo.EVAL_TEXT[:100])  # the model here has 128 positions
    monkeypatch.setattr(demo, "answer", lambda *args, **options: _short_answer(*args, **options))
    ended = run("demo", "--plot", tmp_path / "curve.png")
    assert (ended.code, ended.err) == (0, "")
    for part in ("the model, unquantized", "> What is the capital of France?", "100 tokens of prose", "KL divergence"):
        assert part in ended.out
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    found = only_json(run("demo", "--json", "--prompt", "hm"))
    assert found["comparison"]["kl"] >= 0
    assert found["load"]["quantized"]


def _short_answer(model: Any, prompt: str, *, max_new_tokens: int, **options: Any) -> str:
    from octavo.chat import answer

    return answer(model, prompt, max_new_tokens=3, **options)


# -- as a process of its own ------------------------------------------------------------------------------------------


def _process(*args: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", "from octavo.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_process_prints_json_to_stdout_and_nothing_to_stderr(llama: Path, tmp_path: Path) -> None:
    done = _process("convert", llama, tmp_path / "out", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["in_memory"] is False


def test_process_exits_2_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    done = _process("plan", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "5 bytes long" in done.stderr
    assert "Traceback" not in done.stderr


def test_progress_bar_appears_on_a_terminal_only(llama: Path, tmp_path: Path) -> None:
    """Stderr is a terminal of its own here; stdout stays a pipe that holds nothing but JSON."""
    import pty

    leader, follower = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TERM": "xterm"}
    command = [
        sys.executable,
        "-c",
        "from octavo.cli import main; main()",
        "convert",
        llama,
        tmp_path / "out",
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower, env=environment) as process:
        os.close(follower)
        stdout, _ = process.communicate()
        shown = os.read(leader, 1 << 16).decode()
        os.close(leader)
    assert process.returncode == 0
    assert json.loads(stdout)["final_bytes"]
    assert "Converting" in shown


def test_a_log_without_a_terminal_hears_of_progress_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    quiet, talkative = ProgressLines("Converting"), ProgressLines("Converting", every_s=0)
    for lines in (quiet, talkative):
        lines(1 << 20, 4 << 20)
    assert capsys.readouterr().err == "Converting: 1.00 MiB of 4.00 MiB\n"
