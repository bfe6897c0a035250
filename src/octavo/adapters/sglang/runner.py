"""Where SGLang gives a running model new weights: what is asked there, for models of octavo's, and answered.

Most of it needs no help, since it ends in the model's ``load_weights``. But from disk, SGLang answers any error by
loading the same files again; from tensors, an error ends the server; and the end of an update, which shows whether all
has come, only these places know.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from ...errors import OctavoError
from ..engine import updating
from ..engine.names import LOAD_FORMAT
from ..engine.survey import whole_text
from . import versions

#: formats of ``update_weights_from_disk`` that are the files octavo reads
_SAFETENSORS = (LOAD_FORMAT, "auto", "safetensors")
#: formats of ``update_weights_from_tensor`` that come to ``load_weights``
_TENSORS = (None, "flattened_bucket")

#: what SGLang calls the weights among the memory that it gives back
_WEIGHTS = "weights"
_waking: list[Callable[[], None]] = []


_log = logging.getLogger("sglang.srt.octavo")


class RefusedError(BaseException):
    """Carries an error past SGLang, which would answer an `Exception` by loading the same files again."""


def watch() -> None:
    """Take these places over, once in a process."""
    _wrap(versions.updater(), "update_weights_from_disk", _from_disk)
    _wrap(versions.updater(), "update_weights_from_tensor", _from_tensor)
    for name in versions.updates():
        ends = name in versions.last_of_update()
        _wrap(versions.scheduler_updater(), name, functools.partial(_update, ends=ends))
    _wrap(versions.scheduler_updater(), "begin_weight_update", _first)
    _wrap(versions.scheduler_updater(), "release_memory_occupation", _release)
    _wrap(versions.scheduler_updater(), "resume_memory_occupation", _resume)


def _wrap(owner: type, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name, None)
    if original is None or hasattr(original, "octavo"):
        return

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    method.octavo = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def _from_disk(
    original: Callable[..., Any],
    updater: Any,
    model_path: str,
    load_format: str,
    weight_name_filter: Any = None,
    recapture_cuda_graph: bool = False,
) -> tuple[bool, str]:
    rest = {"recapture_cuda_graph": recapture_cuda_graph}
    weights = updating.of(versions.model_of(updater))
    if weights is None:
        answer: tuple[bool, str] = original(updater, model_path, load_format, weight_name_filter, **rest)
        return answer
    weights.arrivals.drop()  # what waits is of another update, which did not end
    if load_format not in _SAFETENSORS or weight_name_filter is not None:
        what = "some of its tensors only" if weight_name_filter else f"the load format {load_format!r}"
        return False, f"{model_path}: a model that octavo has loaded can't be given {what}. Nothing was loaded."
    path = updater.model_config.model_path
    done = False
    try:
        done, message = original(updater, model_path, LOAD_FORMAT, **rest)
    except RefusedError as refused:
        message = str(refused)
    finally:
        if not done:
            updater.model_config.model_path = path
    return done, message


def _from_tensor(
    original: Callable[..., Any], updater: Any, named_tensors: Any, load_format: str | None = None
) -> tuple[bool, str]:
    weights = updating.of(versions.model_of(updater))
    if weights is None:
        answer: tuple[bool, str] = original(updater, named_tensors, load_format)
        return answer
    if load_format not in _TENSORS:
        weights.arrivals.drop()
        return False, (
            f"update_weights_from_tensor: with the load format {load_format!r}, tensors would be put into what "
            "SGLang's kernels read. Nothing was loaded; leave the load format out."
        )
    try:
        answer = original(updater, named_tensors, load_format)
    except Exception as error:  # layers that are not whole are as they were, so the server may go on
        weights.arrivals.drop()
        return False, _text(error)
    return answer


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, OctavoError) else whole_text(error)


def _first(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    from . import reloading

    answer = original(manager, request)
    if answer.success:
        reloading.drop()
    return answer


def _update(original: Callable[..., Any], manager: Any, request: Any, *, ends: bool) -> Any:
    """A call of an update; without sessions, the last one is that which flushes the cache.

    An exception that SGLang lets through ends its process, and that the server: then there is nobody to agree with.
    """
    from . import reloading

    reloading.bring(getattr(request, "weight_version", None))
    answer = original(manager, request)
    if not answer.success and getattr(request, "flush_cache", False):  # as ranks do that succeed
        manager.flush_cache(empty_cache=request.torch_empty_cache)
    if answer.success and ends and getattr(request, "flush_cache", True):
        try:
            reloading.check_complete()
        except OctavoError as error:
            answer.success, answer.message = False, str(error)
    failures = _failures(manager.tp_cpu_group, None if answer.success else answer.message)
    if failures:
        reloading.drop()
        answer.success, answer.message = False, "\n".join(failures)
    return answer


def _failures(group: Any, mine: str | None) -> list[str]:
    """What went wrong in which rank of a group, all of which call this: SGLang passes on what its first one answers."""
    count = torch.distributed.get_world_size(group)
    if count == 1:
        return [] if mine is None else [mine]
    if mine is not None:
        _log.error("octavo: new weights, rank %d of %d: %s", torch.distributed.get_rank(group), count, mine)
    all_of_them: list[str | None] = [None] * count
    torch.distributed.all_gather_object(all_of_them, mine, group=group)
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(all_of_them):
        if text is not None:
            ranks.setdefault(text, []).append(str(rank))
    return [f"rank {', '.join(which)} of {count}: {text}" for text, which in ranks.items()]


def _release(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    from . import reloading

    if _WEIGHTS in (request.tags or [_WEIGHTS]):
        _waking.append(reloading.sleep(functools.partial(versions.loses_weights, manager)))
    return original(manager, request)


def _resume(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    answer = original(manager, request)
    if _WEIGHTS in (request.tags or [_WEIGHTS]):
        while _waking:
            _waking.pop()()
    return answer


class Reloads:
    """What ``update_weights_from_disk`` asks of a loader."""

    def _get_weights_iterator(self, source: Any) -> Any:
        """How to open a checkpoint: what of it is read, and as what, is the model's to say."""
        return functools.partial(self._open, SimpleNamespace(model_path=source.model_or_path, revision=source.revision))

    def load_weights_and_postprocess(self, model: Any, weights: Any, target_device: Any) -> None:
        from . import reloading

        try:
            reloading.reload(model, weights)
        except Exception as error:
            raise RefusedError(_text(error)) from error

    def _open(self, model_config: Any) -> Any:
        raise NotImplementedError
