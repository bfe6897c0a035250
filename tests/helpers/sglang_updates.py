"""Steps of `helpers.sglang_loading` that give a loaded model new weights, by SGLang's own functions.

``["update", way, path, calls]``: ``calls`` are lists of names of the checkpoint at ``path``, or ``[[]]`` for all of
them; ``way`` is one of `WAYS`. -> [answers of the calls, digests, whether all is where it was].
``["often", [paths], times]``: one checkpoint after another, by all ways. -> [[digests, ...], [resident bytes, ...]].
``["do", name]``: one of `ACTS`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .folders import tensors_of
from .sglang_loading import STEPS, Session, digests, tensors_of_model


def _updater(session: Session) -> tuple[type, Any]:
    """The class that SGLang's methods are of, and what they need of one."""
    from octavo.adapters.sglang import versions

    made = getattr(session, "updater", None)
    if made is None:
        made = session.updater = SimpleNamespace(  # type: ignore[attr-defined]
            device="cpu",
            gpu_id=0,
            tp_rank=0,
            model=session.model,
            get_model=lambda: session.model,
            model_config=session.model_config,
            server_args=session.server_args,
            custom_weight_loaders={},
            update_model_fields=lambda *_, **__: None,
            recapture_cuda_graph=None,
            _model_update_group={"trainer": None},
            _assert_weight_cache_inactive=lambda _: None,
        )
        updater = versions.updater()
        for name in ("_update_weights_from_flattened_bucket", "_update_bucketed_weights_from_distributed"):
            if hasattr(updater, name):
                setattr(made, name, getattr(updater, name).__get__(made))
    return versions.updater(), made


def _from_disk(session: Session, path: Path, _: list[tuple[str, Any]], load_format: str = "octavo") -> Any:
    updater, mine = _updater(session)
    return updater.update_weights_from_disk(mine, str(path), load_format)  # type: ignore[attr-defined]


def _from_tensors(session: Session, _: Path, tensors: list[tuple[str, Any]], load_format: str | None = None) -> Any:
    updater, mine = _updater(session)
    return updater.update_weights_from_tensor(mine, tensors, load_format)  # type: ignore[attr-defined]


def _in_a_bucket(session: Session, path: Path, tensors: list[tuple[str, Any]]) -> Any:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    bucket = FlattenedTensorBucket(named_tensors=tensors)
    given = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    return _from_tensors(session, path, given, "flattened_bucket")  # type: ignore[arg-type]


def _distributed(session: Session, _: Path, tensors: list[tuple[str, Any]]) -> Any:
    """What a trainer broadcasts, without a trainer."""
    import torch

    updater, mine = _updater(session)
    names, dtypes, shapes = zip(*((name, t.dtype, t.shape) for name, t in tensors), strict=True)
    sent, broadcast = iter(tensors), torch.distributed.broadcast

    def receive(into: Any, **_: Any) -> Any:
        into.copy_(next(sent)[1])
        return SimpleNamespace(wait=lambda: None)

    torch.distributed.broadcast = receive
    try:
        if hasattr(updater, "update_weights_from_distributed"):
            return updater.update_weights_from_distributed(mine, names, dtypes, shapes, "trainer")
        wanted = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": "trainer"}
        received = updater.receive_weights_from_distributed(mine, **wanted)  # type: ignore[attr-defined]
        return updater.load_weights_from_distributed(mine, received)  # type: ignore[attr-defined]
    finally:
        torch.distributed.broadcast = broadcast


def _scheduler(session: Session) -> Any:
    """What a scheduler has to pass on what it is asked for."""
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager as Manager

    saver = SimpleNamespace(enabled=True, pause=lambda _: _lose_all_but_buffers(session), resume=lambda _: None)
    updater = SimpleNamespace(begin_weight_update=lambda: None, end_weight_update=lambda **_: None)
    runner = SimpleNamespace(model=session.model, weight_updater=updater)
    worker = SimpleNamespace(
        model_runner=runner,
        server_args=session.server_args,
        weight_update_runners=lambda: [("target", runner)],
        deserialize_own_rank=lambda tensors: tensors,
    )
    given = {
        "tp_worker": worker,
        "draft_worker": None,
        "tp_cpu_group": None,
        "memory_saver_adapter": saver,
        "flush_cache": lambda **_: True,
        "is_fully_idle": lambda **_: True,
        "scheduler": SimpleNamespace(record_weight_version_change=lambda **_: None, _engine_paused=False),
    }
    return Manager(**{field.name: given[field.name] for field in fields(Manager) if field.init and field.name in given})


_REQUEST = {"torch_empty_cache": False, "disable_draft_model": True, "selector": "all"}


def _ask(session: Session, way: str, update: Callable[[], Any], last: bool, version: str | None = None) -> Any:
    """An update by a scheduler, which learns from the request, or at the end of a session, that it is complete."""
    manager = getattr(session, "manager", None)
    if manager is None:
        manager = session.manager = _scheduler(session)  # type: ignore[attr-defined]
    worker, has_sessions = manager.tp_worker, hasattr(manager, "begin_weight_update")
    for owner in (worker, worker.model_runner.weight_updater):
        setattr(owner, way, lambda *_, **__: update())
    if has_sessions and manager._session is None and way.endswith("tensor"):
        manager.begin_weight_update(SimpleNamespace(selector="all"))
    here = {"model_path": "", "load_format": None, "recapture_cuda_graph": False, "serialized_named_tensors": None}
    answer = getattr(manager, way)(SimpleNamespace(**_REQUEST, **here, flush_cache=last, weight_version=version))
    if has_sessions and last and manager._session is not None:
        ended = manager.end_weight_update(SimpleNamespace())
        answer = ended if answer.success else answer
    return answer.success, answer.message


def _by_the_scheduler(
    session: Session, path: Path, tensors: list[tuple[str, Any]], last: bool = True, version: str | None = None
) -> Any:
    return _ask(session, "update_weights_from_tensor", lambda: _from_tensors(session, path, tensors), last, version)


def _more_to_come(session: Session, path: Path, tensors: list[tuple[str, Any]], version: str | None = None) -> Any:
    return _by_the_scheduler(session, path, tensors, False, version)


def _disk_by_the_scheduler(session: Session, path: Path, _: list[tuple[str, Any]]) -> Any:
    return _ask(session, "update_weights_from_disk", lambda: _from_disk(session, path, []), True)


def _bare(session: Session, _: Path, tensors: list[tuple[str, Any]]) -> Any:
    from octavo.errors import OctavoError

    try:
        session.model.load_weights(tensors)
    except OctavoError as error:
        return False, str(error)
    return True, ""


WAYS: dict[str, Callable[..., Any]] = {
    "disk": _from_disk,
    "disk auto": lambda *given: _from_disk(*given, "auto"),
    "disk dummy": lambda *given: _from_disk(*given, "dummy"),
    "tensors": _from_tensors,
    "tensors direct": lambda *given: _from_tensors(*given, "direct"),
    "bucket": _in_a_bucket,
    "distributed": _distributed,
    "last": _by_the_scheduler,
    "more to come": _more_to_come,
    "last of a version": lambda session, path, tensors: _by_the_scheduler(session, path, tensors, True, path.name),
    "more of a version": lambda session, path, tensors: _more_to_come(session, path, tensors, path.name),
    "disk last": _disk_by_the_scheduler,
    "bare": _bare,
}


def _addresses(session: Session) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors_of_model(session.model)}


def _update(session: Session, way: str, path: str, calls: list[list[str]]) -> Any:
    before, answers, tensors = _addresses(session), [], tensors_of(Path(path))
    for names in calls:
        given = [(name, tensors[name]) for name in names or tensors]
        answers.append(list(WAYS[way](session, Path(path), given)))
    return [answers, digests(session.model), _addresses(session) == before]


def _often(session: Session, paths: list[str], times: int) -> Any:
    import psutil

    found, resident, ways = [], [], ("disk", "tensors", "bucket", "distributed")
    first = _addresses(session)
    for number in range(times):
        answers, now, _ = _update(session, ways[number // 2 % len(ways)], paths[number % len(paths)], [[]])
        assert answers[0][0], answers
        found.append(next((known for known in found if known == now), now))  # what is found takes no memory
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    return [found, resident, _addresses(session) == first]


def _lose_all_but_buffers(session: Session) -> None:
    """What memory holds after it was given back and taken again, without a copy elsewhere."""
    import torch

    buffers = {id(buffer) for buffer in session.model.buffers()}
    for _, tensor in tensors_of_model(session.model):
        if id(tensor) not in buffers:
            bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
            (tensor.detach() if tensor.dim() else tensor.detach()[None]).view(bits).fill_(0x3C)


def _process_again(session: Session) -> None:
    """What SGLang does after an update, whatever brought it."""
    import torch

    from octavo.adapters.sglang import versions

    versions.process(session.model, torch.device("cpu"))


def _sleep(session: Session) -> None:
    """Give memory back, and take it again."""
    manager, request = _scheduler(session), SimpleNamespace(tags=["weights"])
    manager.release_memory_occupation(request)
    manager.resume_memory_occupation(request)


def _draft_that_sleeps(session: Session) -> Any:
    """A draft made of the same checkpoint, whose memory is given back with the target's; -> an update's answer.

    The update brings to both all that the target has use for.
    """
    from .sglang_loading import load_draft

    draft = load_draft(session)[1]
    _sleep(session)
    path = Path(session.server_args.model_path)
    tensors = [(name, tensor) for name, tensor in tensors_of(path).items() if ".layers.2." not in name]

    def update() -> Any:
        draft.load_weights(iter(tensors))
        return _from_tensors(session, path, tensors)

    return list(_ask(session, "update_weights_from_tensor", update, True))


def _be_one_of(stages: int) -> None:
    """From now on, be a stage of a pipeline of so many."""
    from sglang.srt.distributed.parallel_state import get_pp_group

    get_pp_group().world_size = stages


ACTS = {
    "process": _process_again,
    "sleep": _sleep,
    "be a stage": lambda _: _be_one_of(2),
    "be all": lambda _: _be_one_of(1),
}
STEPS["update"], STEPS["often"] = _update, _often
STEPS["draft that sleeps"] = _draft_that_sleeps
STEPS["do"] = lambda session, name: ACTS[name](session)
