"""Names of tensors that are not those of a model: a wrapper's in front of them or within, or an adapter's.

Who saves a model that is wrapped saves the wrapper's name with those of its tensors, which no reader finds then. What
torch's own wrappers are called, no module of a model is, so their names are left out wherever they stand: exact, and
safe. ``module`` (of ``DistributedDataParallel``) may be a model's own; it is left out if all names begin with it and
config.json names a model of transformers, none of which is called so. Adapters are refused: they are no model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError
from .header import TensorInfo
from .strangers import MERGE

#: attributes in which torch keeps what it wraps: ``torch.compile``, ``FullyShardedDataParallel``, and checkpointing of
#: activations
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPED = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(_WRAPPERS)})\.")
_DDP = "module."
#: where peft puts a model
_PEFT = "base_model.model."
#: between a module and what peft has put there: the module with adapters beside it, or the one that it trains instead
_WITHIN = re.compile(r"\.(?:base_layer|modules_to_save\.[^.]+)\.")
#: parameters of adapters, by peft's names and those of trainers of diffusion models
_ADAPTER = re.compile(
    r"\.(lora_(A|B|C|E|down|mid|up|embedding_A|embedding_B|magnitude_vector)|dora_scale|hada_[tw]\w+|lokr_[tw]\w+"
    r"|oft_\w+|boft_\w+|ia3_l|vera_\w+)(\.|$)"
)


def unwrapped(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], problems: list[str]
) -> tuple[Mapping[str, TensorInfo], list[str]]:
    """The tensors under the names that they have in their model, and what there is to say."""
    names = "\n".join(tensors)  # searched in a fraction of the time that each of them takes
    found = _without(_WRAPPED, tensors, problems) if any(f"{name}." in names for name in _WRAPPERS) else tensors
    wrappers = sorted({match[0] for name in tensors if found is not tensors for match in _WRAPPED.finditer(name)})
    notes = []
    if _share_prefix(found, _DDP):
        if config.get("model_type") and not config.get("auto_map"):
            found = _without(re.compile(f"^{re.escape(_DDP)}"), found, problems)
            wrappers.append(_DDP)
        else:
            notes.append(
                f"all names begin with {_DDP!r}, as of a model saved through DistributedDataParallel, and are read as "
                "they are, since no config.json says that the model's own do not. Most readers find no such names"
            )
    if wrappers:
        one, other = next((old, new) for old, new in zip(tensors, found, strict=True) if old != new)
        notes.append(
            f"{' and '.join(map(repr, wrappers))}, of a wrapper, left out of the names: {one} is read as {other}"
        )
    return found, notes


def plain_names(name: str) -> list[str]:
    """What a tensor may be called in its model that came by this name: as it is, and without names of wrappers."""
    found = [name, plain := _WRAPPED.sub("", name), plain.removeprefix(_DDP)]
    found.append(_WITHIN.sub(".", plain.removeprefix(_PEFT)))
    return list(dict.fromkeys(found))


def trained(name: str) -> str | None:
    """Where peft trains a module as a whole (``modules_to_save``), what it trains, by the name of what it keeps of it.

    None for all other names.
    """
    path, kept, leaf = name.rpartition(".original_module.")
    return f"{path}.modules_to_save.default.{leaf}" if kept else None


def is_adapters(name: str) -> bool:
    """Return True for a parameter of an adapter."""
    return _ADAPTER.search(name) is not None


def _without(
    wrapper: re.Pattern[str], tensors: Mapping[str, TensorInfo], problems: list[str]
) -> Mapping[str, TensorInfo]:
    if not any(map(wrapper.search, tensors)):
        return tensors
    found: dict[str, TensorInfo] = {}
    origins: dict[str, str] = {}
    for old, info in tensors.items():
        new = wrapper.sub("", old)
        if new in found:
            problems.append(
                f"{origins[new]!r} and {old!r} are one tensor, but for the name of a wrapper: keep one of them"
            )
        found[new], origins[new] = replace(info, name=new), old
    return found


def _share_prefix(names: Collection[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


def check_no_adapter(subject: object, names: Collection[str]) -> None:
    """Raise if these are the tensors of an adapter, or of a model with one inside."""
    if not any(map(_ADAPTER.search, names)):
        return
    if _share_prefix(names, _PEFT):
        # with the model's own matrices among them, or without
        whole = any(".base_layer." in name for name in names)
        first = next(filter(_ADAPTER.search, names))
        what = "a model that peft has wrapped, with an adapter inside" if whole else "an adapter of peft, not a model"
        raise CheckpointError(f"{subject}: {what}: {first}, and all names begin with {_PEFT!r}. {MERGE}")
    if all(map(re.compile(rf"{_ADAPTER.pattern}|\.alpha$").search, names)):
        first = next(filter(_ADAPTER.search, names))
        raise CheckpointError(
            f"{subject}: an adapter, not a model: all of its tensors are like {first}. Merge it into its model first "
            "with the tools that made it (peft's: merge_and_unload, then save_pretrained), and give what comes of it."
        )
