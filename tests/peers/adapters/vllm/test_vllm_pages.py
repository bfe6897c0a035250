"""What the documentation tells users of vLLM to type is taken by vLLM's own parsers, octavo's names among it."""

from __future__ import annotations

import pytest

from helpers import pages

pytestmark = [
    pytest.mark.peers,
    pytest.mark.usefixtures("vllm_loads"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what vLLM imports
]

COMMANDS = [
    (block.place, words)
    for page in pages.pages()
    for block in pages.blocks(page)
    if block.language == "sh"
    for words in pages.commands(block)
    if words[0] == "vllm" or "vllm_generate" in " ".join(words)
]


def test_there_are_commands_of_vllm():
    assert {words[0] for _, words in COMMANDS} == {"vllm", "python"}


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_vllm_takes_the_options(place: str, words: list[str]) -> None:
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from octavo.adapters.vllm import register

    register()
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    options = words[2:]
    if words[0] == "vllm":
        parser.add_argument("model_tag")
    given = parser.parse_args(options)
    assert given.quantization or given.load_format == "octavo"
