"""The page of the command line, made from the application itself: every command, argument and option."""

from __future__ import annotations

import re
from typing import Any

import typer.main

from octavo import cli

_HEAD = """<!-- Made by `make pages` from octavo.cli; changes here are lost. -->

# Command line

Results go to stdout, everything else (progress, errors) to stderr. With `--json`, stdout holds one JSON value and
nothing else. `python -m octavo` is the same command; `octavo --install-completion` teaches your shell its words.

| exit code | means |
|---|---|
| 0 | done |
| 1 | the answer is no: it does not fit, or bytes differ |
| 2 | an error, or wrong usage |
| 130 | interrupted |
"""


def make() -> str:
    """The page."""
    command: Any = typer.main.get_command(cli.app)
    parts = [_HEAD, *(_section(name, found) for name, found in command.commands.items())]
    return "\n".join(parts)


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    required = [f"{p.opts[0]} {p.name.upper()}" for p in options if p.required]
    usage = " ".join(["octavo", name, *(p.name.upper() for p in arguments), *required, "[OPTIONS]"])
    text, examples = _text(command.help or "")
    lines = [f"## octavo {name}", "", text, "", f"    {usage}", ""]
    for example in examples:
        asked = {"--device cuda": "a GPU", "--engine vllm": "vLLM"}
        needs = {"demo": "the package index"}.get(name) or next((asked[o] for o in asked if o in example), None)
        lines += ["```sh" + (f' title="needs {needs}"' if needs else ""), example, "```", ""]
    lines += ["| | | default |", "|---|---|---|"]
    lines += [f"| `{p.name.upper()}` | {_cell(p.help)} | |" for p in arguments]
    lines += [f"| {_names(p)} | {_cell(p.help)} | {_default(p)} |" for p in options]
    return "\n".join(lines) + "\n"


def _text(help_text: str) -> tuple[str, list[str]]:
    """Paragraphs of a command's help, and the example commands in it, which stand out on a terminal."""
    example = re.compile(r"\[(\w+)\](octavo .+?)\[/\1\]")
    rest = re.sub(r"\[/?\w+\]", "", example.sub("", help_text))
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", rest).strip(), [found[2] for found in example.finditer(help_text)]


def _names(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*reversed(option.opts), *option.secondary_opts))
    return names + (" (required)" if option.required else "")


def _cell(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").replace("|", "\\|")


def _default(option: Any) -> str:
    value = option.default
    return "" if value in (None, False, (), []) or callable(value) or option.required else f"`{value}`"
