"""Plans that are remembered from one load of a model to the next, in the user's cache folder.

Asking transformers where thousands of tensors go takes most of what planning takes. What came of it is kept under a
name that is the digest of all that planning looks at: headers and json files of the checkpoint, the recipe, what there
is to know of the model's parameters, its config, transformers' own description of how it is loaded, and the files and
versions of the code that does it. So a plan is found by nobody who would make another.

What is found is not trusted (see `rows`, `entries`): pieces have to lie in their tensors and to tile their parameters,
and these have to be the model's. Whatever is odd counts as nothing, and so does a folder that can't be used.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers.core_model_loading import rename_source_key

from ...checkpoint.checkpoint import Checkpoint
from ...planning.budget import check_options
from ...planning.placement import Placement
from ...planning.plan import Plan
from ...planning.recipe import Recipe
from ..remembering import entries, facts
from ..remembering.checked import natural, require, text, texts
from ..remembering.rows import Reading, Writing
from .facts import facts_of
from .model_plan import conversions_of, kept_in_fp32, plan_model, tied_names
from .versions import warn_of_newer

#: what a report says of a load whose plan was one of these
REMEMBERED = "the plan is that of an earlier load of the same"
#: raise it where the same words come to mean something else
_FORM = 1
#: what a model says about tensors that its checkpoint may lack, or have beside its own
_IGNORED = ("_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing")
#: not what a model is, but where it was found
_OF_THE_PLACE = ("_name_or_path", "name_or_path", "_commit_hash")

_log = logging.getLogger(__name__)


def plan_once(
    model: Any,
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: str,
    staging_bytes: int,
    *,
    strict: bool = True,
    heads: bool = False,
) -> tuple[Plan, bool]:
    """As `plan_model`, and whether the plan was remembered."""
    check_options(staging_bytes)
    newer = warn_of_newer()
    try:
        path: Path | None = entries.path_of(_name(model, checkpoint, recipe, strict, heads))
    except Exception as error:  # of objects of others that are looked at, and of a user without a home
        _log.info("the plan can't be remembered: %s: %s", type(error).__name__, error)
        path = None
    plan = None if path is None else _recall(path, model, checkpoint, recipe, device, staging_bytes)
    remembered = plan is not None
    if plan is None:
        plan = plan_model(model, checkpoint, recipe, device, staging_bytes, strict=strict, heads=heads)
        if path is not None:
            _keep(path, plan, model, checkpoint, device)
    return replace(plan, remarks=(*plan.remarks, *newer)), remembered


# -- what a plan depends on -------------------------------------------------------------------------------------------


def _name(model: Any, checkpoint: Checkpoint, recipe: Recipe, strict: bool, heads: bool) -> str:
    """The digest of all that planning looks at."""
    mapping = conversions_of(model)
    files = {*_files_of(model, mapping), *facts.octavos()}
    return facts.digest(
        f"octavo.load {_FORM}",
        facts.of_versions(),
        transformers.__version__,
        repr(facts.states(files)),
        facts.of_checkpoint(checkpoint),
        repr(recipe),
        f"{strict} {heads}",
        *_of_model(model),
        facts.of_settings(mapping),
    )


def _files_of(model: Any, mapping: Any) -> Iterator[str]:
    """The files of the code that is asked.

    Raises:
        ValueError: some of it is in no file, as in a notebook.
    """
    operations = [operation for entry in mapping for operation in getattr(entry, "operations", ())]
    kinds = {type(each) for each in (*model.modules(), model.config, *mapping, *operations)}
    # without any mapping, names are still compared by transformers
    for name in {base.__module__ for kind in kinds for base in kind.__mro__} | {rename_source_key.__module__}:
        if not facts.is_known_by_version(name):
            file = getattr(sys.modules.get(name), "__file__", None)
            if file is None or name == "__main__":
                raise ValueError(f"{name} is in no file that could be compared")
            yield file


def _of_model(model: Any) -> Iterator[str]:
    """Words for a model: what `plan_model` asks of it."""
    yield f"{type(model).__module__}.{type(model).__qualname__} {model.base_model_prefix} {model.dtype}"
    for name, tensor in (*model.state_dict().items(), *model.named_buffers()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
    for name, fact in facts_of(model).items():
        yield f"{name} {fact}"
    yield repr(sorted((name, sorted(group)) for name, group in tied_names(model).items()))
    # some of these are sets, which have another order in each process
    yield facts.of_settings(kept_in_fp32(model), [getattr(model, name, None) for name in _IGNORED])
    config = {key: value for key, value in model.config.to_dict().items() if key not in _OF_THE_PLACE}
    yield json.dumps(config, sort_keys=True, default=facts.of_settings)


# -- entries ----------------------------------------------------------------------------------------------------------


def _keep(path: Path, plan: Plan, model: Any, checkpoint: Checkpoint, device: str) -> None:
    """Keep a plan, if there is no more to it than where tensors go; what goes wrong is only told."""
    try:
        _check_whole(model, plan.placements)
        require(plan.other_bytes, plan.other_bytes.keys() <= {device})
        writing = Writing(checkpoint, {name: number for number, name in enumerate(checkpoint.tensors)}, device)
        rows = [*map(writing.row, plan.placements)]
        entry = {
            "placements": rows,
            **writing.common(),
            "scheme": plan.recipe.scheme,
            "unused": dict(plan.unused),
            "other_bytes": plan.other_bytes.get(device),
            "remarks": plan.remarks[len(checkpoint.notes) :],
        }
        entries.keep(path, entry)
    except Exception as error:  # whatever it is, the plan itself is whole
        _log.info("the plan can't be remembered: %s: %s", type(error).__name__, error)


def _recall(
    path: Path, model: Any, checkpoint: Checkpoint, recipe: Recipe, device: str, staging_bytes: int
) -> Plan | None:
    """The plan of an earlier load; None where there is none that can be used."""
    try:
        entry = entries.read(path)
        reading = Reading(checkpoint, [*checkpoint.tensors], device, entry)
        placements = tuple(map(reading.placement, entry["placements"]))
        _check_whole(model, placements)
        scheme, others, unused = entry["scheme"], entry["other_bytes"], entry["unused"]
        return Plan(
            str(checkpoint.path),
            Recipe(None if scheme is None else text(scheme), recipe.targets, recipe.ignore),
            placements,
            dict(zip(texts(unused), texts(unused.values()), strict=True)),
            staging_bytes,
            {} if others is None else {device: natural(others)},
            (*checkpoint.notes, *texts(entry["remarks"])),
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # whatever comes of files that were written by who knows whom
        _log.info("the plan in %s can't be used, and is made anew (%s)", path, error)
        return None


def _check_whole(model: Any, placements: Sequence[Placement]) -> None:
    """Raise a ValueError unless these are all parameters of the model, but for those that are tied to one of them."""
    expected, tied = model.state_dict(), tied_names(model)
    placed = {placement.name for placement in placements}
    require(placements, len(placed) == len(placements))
    for placement in placements:
        shape = tuple(expected[placement.name].shape)
        # what is quantized may be stored the other way round
        fits = shape == placement.shape if placement.scheme is None else math.prod(shape) == math.prod(placement.shape)
        require(placement, fits)
    # others were computed, and would have to be again, or are new
    require(expected, all(name in placed or tied.get(name, set()) & placed for name in expected))
