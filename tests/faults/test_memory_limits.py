"""Less memory than a job needs: refused before a weight is read, with the figure, or right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from helpers.models import random_model
from octavo.cli_options import parse_size

MIB = 1 << 20
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space are Linux's")

# Each job runs under a limit that leaves so many bytes beside what the process has already.
_CHILD = """
import json, resource, sys
import torch, octavo
from octavo.memory import _PROC, _table
source, options = sys.argv[1], {"staging_bytes": 96 << 20, "threads": 2}

def convert(dst):
    octavo.convert(source, dst, **options)
def stream(_):
    for pair in octavo.stream(source, **options):
        pass
def load(_):
    octavo.load(source, **options)

def limited(job, argument, room):
    taken = _table(_PROC / "self" / "status")["VmSize"] << 10
    resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.RLIM_INFINITY))
    try:
        globals()[job](argument)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

# what is imported late is there before anything is limited
for job in (convert, stream, load):
    job(sys.argv[2])
for line in sys.stdin:
    try:
        limited(*json.loads(line))
        outcome = "right"
    except octavo.OctavoError as error:
        outcome = f"{type(error).__name__}: {error}"
    print(json.dumps(outcome), flush=True)
"""


class Child:
    """A process whose memory can be limited."""

    def __init__(self, source: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        command = [sys.executable, "-c", _CHILD, str(source), str(source.with_name("warm"))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, job: str, argument: Path, room: int) -> str:
        """``right``, or the error."""
        order: IO[str] = self.process.stdin  # type: ignore[assignment]
        answer: IO[str] = self.process.stdout  # type: ignore[assignment]
        order.write(json.dumps([job, str(argument), room]) + "\n")
        order.flush()
        found: str = json.loads(answer.readline())
        return found

    def close(self) -> None:
        with self.process:
            self.process.stdin.close()  # type: ignore[union-attr]


def needed_by(refusal: str) -> int:
    """The figure of a refusal."""
    found = re.search(r"needs ([\d.]+ \w+) of memory, and the limit of this process \(ulimit -v\) leaves", refusal)
    assert found, refusal
    return parse_size(found[1])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a transformers model."""
    pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("limited") / "source"
    random_model("LlamaConfig", {**sizes, **heads}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def child(source: Path) -> Iterator[Child]:
    made = Child(source)
    yield made
    made.close()


@pytest.mark.parametrize("job", ["convert", "stream", "load"])
def test_a_limit_of_address_space_below_the_need_is_told_with_figures(job: str, child: Child, tmp_path: Path) -> None:
    needed = needed_by(child.run(job, tmp_path / "out", 0))
    # planning takes a little, and figures are rounded
    assert needed_by(child.run(job, tmp_path / "out", needed - MIB)) == needed
    assert list(tmp_path.iterdir()) == []
    assert child.run(job, tmp_path / "out", needed + 16 * MIB) == "right"
