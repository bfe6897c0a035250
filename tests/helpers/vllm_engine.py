"""The real engine of vLLM in a process of its own: `run` starts one for each of its jobs, asks it, and ends it.

    python -m helpers.vllm_engine < jobs > answers

Jobs are JSON: options of ``vllm.LLM`` and what to ask. An answer, a line of JSON on the original stdout, holds digests
of all parameters, tokens and prompt logprobs; or the error. Nothing of vLLM is imported in the process of the tests.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .folders import tensors_of

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "INFO",  # whatever other tests of the same process want: octavo's lines are looked at
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # for functions that are sent to workers
    "OMP_NUM_THREADS": "1",
}
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [200, 100, 50, 25, 12, 6, 3]]
_FIELDS = ("parameters", "tokens", "logprobs", "results", "error")
_MARK = '{"parameters"'
_NEXT = "\n-- next job --\n"


@dataclass
class Answer:
    """What an engine said, or why it did not start."""

    parameters: list[dict[str, str]] = field(default_factory=list)  # of each rank: name -> digest
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[dict[str, float]]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)  # of the steps
    log: list[str] = field(default_factory=list)  # octavo's lines
    error: str = ""
    output: str = field(default="", repr=False)


@dataclass
class Job:
    """A model to load with ``vllm.LLM(model, **options)``.

    ``steps`` are taken after the first answers: each ``[name, *arguments]`` of a method of `_Session`. Where it is only
    ``loaded``, parameters are all that is answered.
    """

    model: Path
    options: dict[str, Any] = field(default_factory=dict)
    steps: list[list[Any]] = field(default_factory=list)
    loaded: bool = False


def octavo_job(model: Path, scheme: str = "fp8_channel", steps: Sequence[list[Any]] = (), **options: Any) -> Job:
    """Through octavo."""
    extra = {"load_format": "octavo", "model_loader_extra_config": {"scheme": scheme}}
    return Job(model, {**extra, **options}, list(steps))


def run(*jobs: Job, replicas: int = 1, timeout: float = 300) -> list[Answer]:
    """One engine after another, in one process and its workers: importing vLLM takes longer than all that is asked.

    With ``replicas``, so many processes answer the same side by side, as data parallel engines; what they say is one
    answer, of one after another.
    """
    (ranks,) = {job.options.get("tensor_parallel_size", 1) for job in jobs}
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if ranks > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(ranks))  # a core each
    given = json.dumps([{**asdict(job), "model": str(job.model.absolute())} for job in jobs])
    ask = functools.partial(_ask, given, len(jobs), timeout)
    if replicas == 1:
        return ask(environment)
    meeting = {
        "VLLM_DP_SIZE": str(replicas),
        "VLLM_DP_MASTER_IP": "127.0.0.1",
        "VLLM_DP_MASTER_PORT": str(free_port()),
    }
    with ThreadPoolExecutor(replicas) as pool:
        environments = [{**environment, **meeting, "VLLM_DP_RANK": str(number)} for number in range(replicas)]
        return [_joined(answers) for answers in zip(*pool.map(ask, environments), strict=True)]


def _ask(jobs: str, count: int, timeout: float, environment: dict[str, str]) -> list[Answer]:
    finished = subprocess.run(
        [sys.executable, "-m", "helpers.vllm_engine"],
        input=jobs,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    found = [Answer(**json.loads(line)) for line in finished.stdout.splitlines() if line.startswith(_MARK)]
    logs = finished.stderr.split(_NEXT)
    for answer, log in zip(found, logs, strict=False):
        answer.output = log
        answer.log = [line.partition("octavo: ")[2] for line in log.splitlines() if "octavo: " in line]
    lost = Answer(error=f"the process ended with {finished.returncode}", output=finished.stderr)
    return [*found, *[lost] * (count - len(found))]


def _joined(answers: Sequence[Answer]) -> Answer:
    first, *others = answers
    for name in (of.name for of in fields(Answer)):
        for other in others:
            setattr(first, name, getattr(first, name) + getattr(other, name))
    return first


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# -- in the engine's process ------------------------------------------------------------------------------------------


def digests(model: Any) -> dict[str, str]:
    """SHA-256 of every parameter and buffer, with its dtype and shape."""
    return {name: digest(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def digest(tensor: Any) -> str:
    import torch

    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def addresses(model: Any) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.named_parameters()}


def _draft_digests(worker: Any) -> dict[str, str]:
    return digests(worker.model_runner.drafter.model)


class _Session:
    def __init__(self, model: str, options: dict[str, Any]) -> None:
        from vllm import LLM

        defaults = {
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 64,
            "max_num_seqs": 4,
            "dtype": "bfloat16",
            "seed": 0,
        }
        if options.get("tensor_parallel_size", 1) == 1:
            defaults["distributed_executor_backend"] = "uni"
        self.llm = LLM(model=model, **{**defaults, **options})

    def parameters(self) -> list[dict[str, str]]:
        return list(self.llm.apply_model(digests))

    def addresses(self) -> list[dict[str, int]]:
        return list(self.llm.apply_model(addresses))

    def generate(self) -> tuple[list[list[int]], list[list[dict[str, float]]]]:
        from vllm import SamplingParams

        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in PROMPTS]
        logprobs_of_prompt = (
            None if self.llm.llm_engine.vllm_config.lora_config else 3
        )  # with adapters, vLLM on a CPU can't
        params = SamplingParams(
            temperature=0, max_tokens=8, prompt_logprobs=logprobs_of_prompt, detokenize=False, ignore_eos=True
        )
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        logprobs = [
            [{str(k): v.logprob for k, v in at.items()} for at in output.prompt_logprobs or () if at]
            for output in outputs
        ]
        return tokens, logprobs

    # steps

    def draft(self) -> dict[str, str]:
        """Digests of the draft's parameters."""
        return dict(self.llm.collective_rpc(_draft_digests)[0])

    def twice(self) -> list[Any]:
        """[tokens, how many of the prompt came from the cache of prefixes] of a longer prompt, asked twice."""
        return [self._plainly([PROMPTS[0] * 4])[0] for _ in range(2)]

    def pooled(self) -> list[list[float]]:
        """The vectors of an engine that pools."""
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in PROMPTS]
        return [list(output.outputs.embedding) for output in self.llm.embed(prompts, use_tqdm=False)]

    def adapted(self, path: str) -> list[Any]:
        """Tokens with a LoRA adapter."""
        from vllm.lora.request import LoRARequest

        return [tokens for tokens, _ in self._plainly(PROMPTS, lora_request=LoRARequest("adapter", 1, path))]

    def _plainly(self, prompts: list[list[int]], **options: Any) -> list[tuple[list[int], int]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=8, detokenize=False, ignore_eos=True)
        given: list[Any] = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(given, params, use_tqdm=False, **options)
        return [(list(output.outputs[0].token_ids), output.num_cached_tokens or 0) for output in outputs]

    def reload_path(self, path: str) -> str:
        return _error(lambda: self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path}))

    def reload_iterator(self, path: str) -> str:
        weights = _weights(path)
        return _error(lambda: self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights}))

    def bare_load(self, path: str) -> str:
        weights = _weights(path)
        return _error(lambda: self.llm.apply_model(lambda model: bool(model.load_weights(weights))))

    def transfer(self, path: str, tensors_at_once: int) -> str:
        """As a trainer does, some tensors at a time; through an engine that reads a file instead of a network."""

        def update() -> None:
            self.llm.collective_rpc("start_weight_update")
            names = [name for name, _ in _weights(path)]
            for at in range(0, len(names), tensors_at_once):
                info = {"path": path, "names": names[at : at + tensors_at_once]}
                self.llm.collective_rpc("update_weights", args=(info,))
            self.llm.collective_rpc("finish_weight_update")

        return _error(update)

    def finish(self) -> str:
        """End a transfer of which the end failed, and so for vLLM goes on."""
        return _error(lambda: self.llm.collective_rpc("finish_weight_update"))

    def reload_often(self, paths: list[str], times: int) -> list[list[Any]]:
        """[resident bytes, tokens] after each reload of one path after another."""
        seen = []
        for number in range(times):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": paths[number % len(paths)]})
            gc.collect()
            seen.append([_rss(), self.generate()[0]])
        return seen

    def nap(self, level: int, path: str) -> str:
        """Sleep and wake up; at level 2 the memory comes back empty, and weights are loaded again from a path."""

        def act() -> None:
            self.llm.sleep(level=level)
            self.llm.wake_up(tags=["weights"])
            if level == 2:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
            self.llm.wake_up(tags=["kv_cache"])

        return _error(act)

    def state(self) -> dict[str, Any]:
        tokens, logprobs = self.generate()
        return {
            "parameters": self.parameters(),
            "addresses": self.addresses(),
            "tokens": tokens,
            "logprobs": logprobs,
        }


def _weights(path: str) -> list[tuple[str, Any]]:
    return list(tensors_of(Path(path)).items())


def _error(act: Callable[[], Any]) -> str:
    try:
        act()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _rss() -> int:
    from octavo.machine import rss_bytes

    return rss_bytes()


def _register_file_transfer() -> None:
    """A weight transfer engine of vLLM whose network is a file."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class Init:
        pass

    @dataclass
    class Update:
        path: str
        names: list[str]

    class FileTransfer(WeightTransferEngine):
        init_info_cls, update_info_cls = Init, Update

        def init_transfer_engine(self, init_info: Any) -> None:
            pass

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: Any) -> None:
            self.model.load_weights([pair for pair in _weights(update_info.path) if pair[0] in update_info.names])

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

        @staticmethod
        def trainer_send_weights(*args: Any, **kwargs: Any) -> None:
            """Of the other side, in 0.24."""

    WeightTransferEngineFactory.register_engine("file", FileTransfer)


def _answer(job: dict[str, Any]) -> Answer:
    answer = Answer()
    try:
        session = _Session(job["model"], job["options"])
        answer.parameters = session.parameters()
        if not job["loaded"]:
            answer.tokens, answer.logprobs = session.generate()
        for name, *arguments in job["steps"]:
            answer.results.append(getattr(session, name)(*arguments))
    except BaseException as error:
        traceback.print_exc()
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever logs to stdout does not mix with the answers
    _register_file_transfer()
    for job in json.load(sys.stdin):
        answer = _answer(job)
        out.write(json.dumps({name: getattr(answer, name) for name in _FIELDS}) + "\n")
        out.flush()
        sys.stderr.write(_NEXT)
        sys.stderr.flush()
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    # by its name, so that workers can be sent functions of this module
    from helpers import vllm_engine

    vllm_engine._main()
