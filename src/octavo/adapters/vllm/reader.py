"""vLLM as the reader of a checkpoint in FP8: what ``vllm serve`` would make of it.

vLLM takes seconds to import, sets up logging, plugins and process groups, and some of its models start threads. So it
is asked in a process of its own (`asking`), which begins while others are asked, has a time limit, and is ended with
the reader, or whenever waiting for it is interrupted. That process is given a folder with config.json as it will be,
links to all else that lies beside the weights, and the names, dtypes and shapes of the tensors. This module imports no
vLLM, and neither does the process that uses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.header import TensorInfo
from ...conversion.proof import Judgement

NAME = "vLLM"
#: for one question; most of it is importing vLLM, or its models
_LIMIT_S = 300.0
#: where this package is found
PACKAGE = str(Path(__file__).parents[3])
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
#: what is not linked: weights, and what names them; config.json is another one
_NO_LINK = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")


class VllmReader:
    """See `octavo.conversion.proof.Reader`. Its process lives as long as it does, at most."""

    def __init__(self, limit_s: float = _LIMIT_S) -> None:
        self._limit_s = limit_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), PACKAGE)))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from octavo.adapters.vllm.asking import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for us, who end it
        )
        self._end = weakref.finalize(self, _end, self._process, self._log)
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True).start()

    def judge(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, TensorInfo],
        scales: Mapping[str, str],
        config: Mapping[str, Any],
    ) -> Judgement:
        with tempfile.TemporaryDirectory(prefix="octavo-vllm-") as folder:
            lay_out(Path(folder), checkpoint, tensors, scales, config)
            try:
                return self._ask(folder)
            except BaseException:  # of an interrupt, too: nobody waits for an answer any more
                self._end()
                raise

    def _ask(self, folder: str) -> Judgement:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(folder.encode() + b"\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=self._limit_s)
        except queue.Empty:
            self._end()
            return Judgement(NAME, unproved=f"it did not answer within {self._limit_s:.0f} s")
        except (OSError, ValueError):  # it has ended, or was ended
            line = b""
        if not line:
            return Judgement(NAME, unproved=self._last_words())
        fields: dict[str, Any] = json.loads(line)
        fields.update({key: tuple(value) for key, value in fields.items() if isinstance(value, list)})
        return Judgement(**fields)

    def _last_words(self) -> str:
        if self._log.closed:
            return "its process was ended"
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read()[-4000:].decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "no word")
        return f"its process ended with {code}: {last}"


def lay_out(
    folder: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, TensorInfo],
    scales: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Make the folder that would be served, without weights."""
    served = folder / "model"
    served.mkdir()
    (served / "config.json").write_text(json.dumps(dict(config)))
    for entry in checkpoint.folder.iterdir():
        if entry.name != "config.json" and not entry.name.endswith(_NO_LINK):
            with contextlib.suppress(OSError):  # where links can't be made, it does without
                (served / entry.name).symlink_to(entry.resolve())
    infos = [(info.name, info.dtype_name, info.shape, info.nbytes) for info in tensors.values()]
    (folder / "case.json").write_text(json.dumps({"tensors": infos, "scales": dict(scales)}))


def _listen(pipe: Any, answers: queue.SimpleQueue[bytes]) -> None:
    with contextlib.suppress(ValueError):  # the pipe is closed when nobody listens any more
        for line in pipe:
            answers.put(line)
        answers.put(b"")


def _end(process: subprocess.Popen[bytes], log: Any) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, 9)  # it holds nothing that would have to be put away
    process.wait()
    for pipe in (process.stdin, process.stdout, log):
        with contextlib.suppress(OSError):
            assert pipe is not None
            pipe.close()
