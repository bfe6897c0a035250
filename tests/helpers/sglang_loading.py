"""Real models of SGLang on a CPU, loaded by SGLang's own loader and never run: no engine, none of its kernels.

    RANK=0 RANKS=1 RENDEZVOUS=file python -m helpers.sglang_loading < jobs > answers

Jobs are JSON: options of ``sglang.srt.server_args.ServerArgs``, and steps to take afterwards. An answer, a line of JSON
on the original stdout, holds digests of all that the model holds, or the error. Nothing of SGLang is imported in the
process of the tests.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(TESTS)]),
}


@dataclass
class Answer:
    """What one rank loaded, or why it did not.

    A digest is of a parameter, a buffer, or a tensor that a module has as a plain attribute.
    """

    loaded: dict[str, str] = field(default_factory=dict)  # name -> digest, before SGLang's post-processing
    served: dict[str, str] = field(default_factory=dict)  # name -> digest, after it
    quantization: str = ""  # as SGLang's ModelConfig has it
    results: list[Any] = field(default_factory=list)  # of the steps
    error: str = ""
    output: str = field(default="", repr=False)  # of the rank's process, for all of its jobs


@dataclass
class Job:
    """A model to load, as ``ServerArgs(model, **options)`` says.

    ``steps`` are taken afterwards: each ``[name, *arguments]`` of `STEPS`.
    """

    model: Path
    options: dict[str, Any] = field(default_factory=dict)
    steps: list[list[Any]] = field(default_factory=list)


def octavo_job(model: Path, scheme: str = "fp8_channel", steps: Sequence[list[Any]] = (), **options: Any) -> Job:
    """Through octavo; ``extra`` goes into the loader's extra config."""
    extra = json.dumps({"scheme": scheme, **options.pop("extra", {})})
    return Job(model, {"load_format": "octavo", "model_loader_extra_config": extra, **options}, list(steps))


def load(*jobs: Job, timeout: float = 300) -> list[Answer]:
    """Load one model after another, in one process."""
    return [answer for (answer,) in load_ranks(1, *jobs, timeout=timeout)]


def load_ranks(ranks: int, *jobs: Job, timeout: float = 300) -> list[list[Answer]]:
    """The same by ``ranks`` processes that talk through gloo; -> for each job the answers of its ranks."""
    given = json.dumps([{**asdict(job), "model": str(job.model.absolute())} for job in jobs])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "jobs").write_text(given)
        started = [_start(rank, ranks, Path(folder)) for rank in range(ranks)]
        try:
            for process in started:
                process.wait(timeout)
        finally:
            for process in started:
                process.kill()
                process.wait()
        answers = [_answers(Path(folder), rank, len(jobs)) for rank in range(ranks)]
    return [list(of_job) for of_job in zip(*answers, strict=True)]


def _start(rank: int, ranks: int, folder: Path) -> subprocess.Popen[str]:
    place = {"RANK": str(rank), "RANKS": str(ranks), "RENDEZVOUS": str(folder / "rendezvous")}
    with (
        (folder / "jobs").open() as jobs,
        (folder / f"{rank}.answers").open("w") as answers,
        (folder / f"{rank}.log").open("w") as log,
    ):
        return subprocess.Popen(
            [sys.executable, "-m", "helpers.sglang_loading"],
            stdin=jobs,
            stdout=answers,
            stderr=log,
            text=True,
            env={**os.environ, **ENVIRONMENT, **place},
            cwd=TESTS,
        )


def _answers(folder: Path, rank: int, count: int) -> list[Answer]:
    lines, log = ((folder / f"{rank}.{kind}").read_text() for kind in ("answers", "log"))
    found = [Answer(**json.loads(line), output=log) for line in lines.splitlines()]
    assert len(found) == count, log[-4000:]
    return found


# -- in the process of a rank -----------------------------------------------------------------------------------------


@dataclass
class Session:
    """A model that was loaded, and what a model runner of SGLang has beside it."""

    model: Any
    loader: Any
    model_config: Any
    server_args: Any


def load_draft(session: Session, path: str | None = None) -> tuple[Any, Any]:
    """A loader, and the model that it made, for a worker that drafts beside the model."""
    from sglang.srt.configs.model_config import ModelConfig

    path = path or session.server_args.model_path
    model_config = ModelConfig.from_server_args(session.server_args, model_path=path, is_draft_model=True)
    return _load(session.server_args, model_config)


def _draft(session: Session, path: str | None = None) -> dict[str, str]:
    """What a worker for drafts loads beside the model, by layers of its checkpoint or from another; -> digests."""
    return digests(load_draft(session, path)[1])


def _methods(session: Session) -> dict[str, list[str]]:
    """Layer -> classes of what SGLang has it computed by."""
    found = {}
    for name, module in session.model.named_modules():
        if method := getattr(module, "quant_method", None):
            found[name] = [type(module).__name__, type(method).__name__, type(getattr(module, "scheme", None)).__name__]
    return found


#: what can be done with a loaded model: name -> function of the session and further arguments, to something for JSON
STEPS: dict[str, Callable[..., Any]] = {"draft": _draft, "methods": _methods}


def tensors_of_model(model: Any) -> Iterator[tuple[str, Any]]:
    """All tensors that a model holds, by name: also those that are no parameters and no buffers."""
    import torch

    for prefix, module in model.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
        for name, tensor in {**module._parameters, **module._buffers, **plain}.items():
            if tensor is not None:
                yield f"{prefix}.{name}".lstrip("."), tensor


def digests(model: Any) -> dict[str, str]:
    """SHA-256 of all tensors of a model, with dtype and shape."""
    return {name: digest(tensor) for name, tensor in tensors_of_model(model)}


def digest(tensor: Any) -> str:
    import torch

    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def _fitting(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it with as many of the arguments as it takes: later versions know more of themselves."""
    return function(*arguments[: len(inspect.signature(function).parameters)])


def _publish(server_args: Any) -> None:
    """Have the process know its arguments, as a scheduler's does."""
    from sglang.srt import runtime_context

    if hasattr(runtime_context, "publish"):
        ranks = runtime_context.SpawnRanks(world_rank=int(os.environ["RANK"]), gpu_id=0)
        runtime_context.publish(server_args, role="scheduler", ranks=ranks)
    else:
        from sglang.srt.server_args import set_global_server_args_for_scheduler

        set_global_server_args_for_scheduler(server_args)


@functools.cache
def _join(expert_parallel: int, pipeline: int = 1) -> None:
    """Be a rank among ranks, or a stage of a pipeline.

    The groups stay what they are, so all jobs of a process are of one size.
    """
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel

    rank, ranks = int(os.environ["RANK"]), int(os.environ["RANKS"])
    rendezvous = f"file://{os.environ['RENDEZVOUS']}"
    init_distributed_environment(ranks, rank, rendezvous, rank, backend="gloo")
    widths = "tensor_model_parallel_size" in inspect.signature(initialize_model_parallel).parameters
    initialize_model_parallel(*(ranks // pipeline, expert_parallel, pipeline) if widths else ())


def _settle(server_args: Any, model_config: Any) -> None:
    """What a model runner decides before it loads."""
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config

    _fitting(initialize_dp_attention, server_args, model_config)
    _fitting(initialize_moe_config, server_args)
    _fitting(initialize_fp8_gemm_config, server_args)


def load_session(model: str, options: dict[str, Any]) -> Session:
    """Do what a model runner does until the weights are there."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

    width = int(os.environ["RANKS"]) // options.get("pp_size", 1)
    defaults = {"device": "cpu", "dtype": "bfloat16", "disable_cuda_graph": True, "tp_size": width}
    server_args = ServerArgs(model_path=model, **{**defaults, **options})
    _publish(server_args)
    model_config = ModelConfig.from_server_args(server_args)
    _join(options.get("ep_size", 1), options.get("pp_size", 1))
    _settle(server_args, model_config)
    loader, loaded = _load(server_args, model_config)
    return Session(loaded, loader, model_config, server_args)


def _load(server_args: Any, model_config: Any) -> tuple[Any, Any]:
    """A loader, and the model that it made."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
    from sglang.srt.model_loader.loader import get_model_loader

    load_config = LoadConfig(
        load_format=server_args.load_format,
        model_loader_extra_config=server_args.model_loader_extra_config,
        tp_rank=int(os.environ["RANK"]),
    )
    if server_args.device == "cpu":
        model_config = adjust_config_with_unaligned_cpu_tp(model_config, load_config, server_args.tp_size)
    loader = get_model_loader(load_config, model_config)
    return loader, loader.load_model(model_config=model_config, device_config=DeviceConfig("cpu"))


class _BeforePostProcessing:
    """Digests of the model that was made last, taken when the first of its layers is about to be post-processed."""

    def __init__(self) -> None:
        from sglang.srt.model_loader import loader

        self.digests: dict[str, str] | None = None
        self._model: Any = None
        self._watched: set[type] = set()
        make = loader._initialize_model

        def made(*arguments: Any, **options: Any) -> Any:
            self._model, self.digests = make(*arguments, **options), None
            for module in self._model.modules():
                self._watch(type(getattr(module, "quant_method", None)))
            return self._model

        loader._initialize_model = made

    def _watch(self, method: type) -> None:
        name = "process_weights_after_loading"
        owner = next((base for base in method.__mro__ if name in vars(base)), None)
        if owner is None or owner in self._watched:
            return
        self._watched.add(owner)
        process = vars(owner)[name]

        @functools.wraps(process)
        def processed(method: Any, layer: Any, *arguments: Any, **options: Any) -> Any:
            first = self._model is not None and self.digests is None  # and not when weights are new
            if first and not any(tensor.is_meta for tensor in layer.parameters()):
                self.digests = digests(self._model)
            return process(method, layer, *arguments, **options)

        setattr(owner, name, processed)

    def take(self) -> dict[str, str]:
        taken, self.digests, self._model = self.digests, None, None
        assert taken is not None, "no layer was post-processed"
        return taken


def _answer(job: dict[str, Any], before: _BeforePostProcessing) -> dict[str, Any]:
    answer: dict[str, Any] = {"results": []}
    try:
        session = load_session(job["model"], job["options"])
        answer["loaded"], answer["served"] = before.take(), digests(session.model)
        answer["quantization"] = session.model_config.quantization or ""
        for name, *arguments in job["steps"]:
            answer["results"].append(STEPS[name](session, *arguments))
    except Exception as error:
        traceback.print_exc()
        answer["loaded"] = before.digests or {}
        answer["error"] = f"{type(error).__name__}: {error}"
    return answer


def as_on_hopper() -> None:
    """Have SGLang not ask CUDA what the GPU can, where there is none."""
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    CompressedTensorsConfig._check_scheme_supported = lambda *arguments, **options: True
    _repack_plainly()


def _repack_plainly() -> None:
    """Have SGLang bring weights of four bits into another form without a kernel: not Marlin's, but of its shape."""
    from sglang.srt.layers.quantization import marlin_utils_fp4

    def repack(b_q_weight: Any, size_k: int, **options: Any) -> Any:
        return b_q_weight.reshape(size_k // 16, -1)

    marlin_utils_fp4.gptq_marlin_repack = repack
    marlin_utils_fp4.marlin_make_workspace = lambda *arguments: None


def _main() -> None:
    from helpers import sglang_stand_ins

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever logs to stdout does not mix with the answers
    sglang_stand_ins.install()
    from sglang.srt.plugins import load_plugins

    load_plugins()
    as_on_hopper()
    before = _BeforePostProcessing()
    for job in json.load(sys.stdin):
        out.write(json.dumps(_answer(job, before)) + "\n")
        out.flush()


if __name__ == "__main__":
    # by its name, so that steps that other modules add to it are there
    from helpers import sglang_loading, sglang_updates  # noqa: F401  (it adds steps)

    sglang_loading._main()
