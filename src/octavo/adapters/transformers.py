"""transformers models, loaded as FP8 while their checkpoint streams.

    skeleton    the model, parameters on meta, buffers real
    plan        transformers' own conversion mapping, run on symbolic tensors: where every checkpoint element goes
    swap        linear layers and expert stacks that the plan quantizes take their FP8 form
    stream      parameters are allocated, then filled chunk by chunk
    tie         tied weights, generation config

How checkpoint tensors become parameters (stacking experts, fusing gate and up, transposing, renaming) is transformers'
knowledge; none of it is repeated here. `octavo.load` and the quantizer for ``from_pretrained`` (`OctavoConfig`) both go
this way.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import dtypes, kinds, modules
from ..checkpoint import Checkpoint
from ..errors import (
    CheckpointError,
    CoverageError,
    MissingExtraError,
    RecipeError,
    raise_problems,
)
from ..geometry import usable_device
from ..pieces import NotMovementError, Symbolic, coverage_problem
from ..plan import DEFAULT_STAGING_BYTES, Plan, Target, make_plan
from ..recipe import Recipe
from ..report import Report, Stages, measured
from ..sinks import ParameterSink, Storage
from ..stream import Stream

try:
    import transformers
    from accelerate import init_empty_weights
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )
except ImportError as error:
    raise MissingExtraError("transformers", "loading a transformers model") from error

#: what quantization_config.quant_method says of a model that octavo quantized
METHOD = "octavo"
_STACKS = ("gate_up_proj", "up_proj", "down_proj")


def load(
    path: str | os.PathLike[str],
    scheme: str | Recipe | Mapping[str, Any] | None = "fp8_channel",
    device: str | torch.device = "cpu",
    *,
    ignore: Iterable[str] = (),
    dtype: torch.dtype | str | None = None,
    model_class: Any = None,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    threads: int | None = None,
    strict: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    progress: bool | Callable[[int, int], None] | None = None,
) -> Any:
    """Load a transformers model as FP8 while its checkpoint streams.

    The result is an ordinary transformers model (``generate``, ``save_pretrained``, pipelines), in eval mode, whose
    linear layers and expert stacks hold ``torch.float8_e4m3fn``. ``model.load_report`` says what happened.

    Args:
        path: folder, ``.safetensors`` file, or hub id.
        scheme: ``fp8_channel``, ``fp8_block``, ``fp8_tensor``, ``mxfp8``, a `Recipe` or its dict form; None loads
            without quantizing.
        device: where the model goes.
        ignore: patterns of weights to leave as they are; see `Recipe`.
        dtype: of everything that is not quantized; default: what the config says, as ``from_pretrained`` does.
        model_class: a transformers model class or auto class; default: what the config names.
        staging_bytes: bound on memory beyond the final model, on the host and on the device.
        threads: reader threads; default: one a core, at most 16.
        strict: whether checkpoint tensors that the model has no place for are an error. Missing ones always are.
        revision: of a hub id.
        trust_remote_code: let the checkpoint bring its own model code, as in transformers.
        attn_implementation: as in transformers.
        progress: True or False to show a bar or not, or a callable given bytes read and bytes in all; by default, a
            bar where the terminal can show one.

    Raises:
        OctavoError: see `octavo.errors`; no model is left behind.
    """
    stages = Stages()
    recipe = Recipe.coerce(scheme, ignore)
    target_device = usable_device(device)
    prepared = prepare(
        path,
        recipe,
        str(target_device),
        staging_bytes,
        stages=stages,
        strict=strict,
        revision=revision,
        dtype=dtype,
        model_class=model_class,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
    )
    checkpoint, model, plan = prepared.checkpoint, prepared.model, prepared.plan
    with stages("swap"):
        swap(model, plan)
    with measured(plan, progress) as meter:
        with stages("allocate"):
            storages = {p.name: Storage.allocate(p) for p in plan.placements}
        with stages("stream"):
            stream = Stream(checkpoint, plan, ParameterSink(storages), threads=threads)
            meter.follow(stream.tally)
            tally = stream.run(meter.progress)
        with stages("finish"):
            assign(model, plan, storages)
            del storages
            _finish(model, checkpoint, target_device)
    notes = ["no weight was quantized: see what was kept, and why"] if _idle(prepared, recipe) else []
    model.load_report = Report.of(plan, stream.geometry, tally, stages, meter, notes=notes)
    if prepared.saved or plan.quantized:
        from .quantizer import mark_quantized

        mark_quantized(model, prepared.saved or recipe)
    return model


def _idle(prepared: Prepared, recipe: Recipe) -> bool:
    return not prepared.saved and bool(recipe.scheme or recipe.targets) and not prepared.plan.quantized


@dataclass(frozen=True)
class Prepared:
    """What is known before a weight is read."""

    checkpoint: Checkpoint
    model: Any  # on meta
    plan: Plan
    saved: Recipe | None  # of a model that octavo quantized and ``save_pretrained`` wrote


def prepare(
    path: str | os.PathLike[str],
    recipe: Recipe,
    device: str = "cpu",
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    *,
    stages: Stages | None = None,
    strict: bool = True,
    revision: str | None = None,
    **model_options: Any,
) -> Prepared:
    """Open, build the skeleton, plan: all of a load but reading weights. Options and errors as for `load`."""
    stages = stages or Stages()
    with stages("open"):
        checkpoint = Checkpoint.open(path, revision)
        saved = _saved_recipe(checkpoint, recipe)
    with stages("skeleton"):
        model = skeleton(checkpoint, **model_options)
    with stages("plan"):
        if saved:
            _swap_saved(model, checkpoint)
        todo = Recipe(None) if saved else recipe
        plan = plan_model(model, checkpoint, todo, device, staging_bytes, strict=strict)
    return Prepared(checkpoint, model, plan, saved)


def _saved_recipe(checkpoint: Checkpoint, asked: Recipe) -> Recipe | None:
    """The recipe of a model that octavo quantized and ``save_pretrained`` wrote; None for any other checkpoint."""
    if checkpoint.quantization is None:
        return None
    if checkpoint.quantization != METHOD:
        raise RecipeError(
            f"{checkpoint.path}: already quantized ({checkpoint.quantization}, says its config.json). octavo.load "
            "takes bf16 checkpoints and what it saved itself: load this with from_pretrained. Start from the bf16 one."
        )
    from .quantizer import OctavoConfig

    saved: Recipe = OctavoConfig(**checkpoint.config["quantization_config"]).recipe
    if asked not in (saved, Recipe(), Recipe(None)):
        raise RecipeError(f"{checkpoint.path}: saved as FP8 by another recipe ({saved}); it can't be quantized again")
    return saved


def _swap_saved(model: Any, checkpoint: Checkpoint) -> None:
    from .quantizer import swap_saved

    try:
        swap_saved(model, checkpoint.config["quantization_config"]["weights"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: quantization_config does not fit the model: "
            f"{type(error).__name__}: {error}"
        ) from error


# -- skeleton ---------------------------------------------------------------------------------------------------------


def skeleton(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | str | None = None,
    model_class: Any = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> Any:
    """The model with parameters on meta and buffers real, as ``from_pretrained`` would set it up."""
    folder = str(checkpoint.folder)
    if not checkpoint.config:
        raise CheckpointError(f"{folder}: no config.json (or an empty one), which would say what model this is")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; all mean the same here
        raise CheckpointError(f"{folder}/config.json: transformers can't read it: {error}") from error
    chosen = _dtype(dtype, config, checkpoint)
    cls = model_class or _model_class(config, checkpoint, trust_remote_code)
    options: dict[str, Any] = {"dtype": chosen}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    try:
        with init_empty_weights(include_buffers=False):
            if hasattr(cls, "_model_mapping"):
                model = cls.from_config(config, trust_remote_code=trust_remote_code, **options)
            else:
                model = cls._from_config(config, **options)
        _compute_buffers(model)
    except Exception as error:  # what a config and options lead to is transformers' to say
        raise CheckpointError(
            f"{folder}: transformers can't build {getattr(cls, '__name__', cls)} from this config.json "
            f"with {options}: {type(error).__name__}: {error}"
        ) from error
    model.config.name_or_path = folder
    if model.can_generate():
        with contextlib.suppress(OSError):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.eval()
    return model


def _dtype(dtype: torch.dtype | str | None, config: Any, checkpoint: Checkpoint) -> torch.dtype:
    if dtype is not None and dtype != "auto":
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if named not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise RecipeError(f"dtype must be a torch dtype that a model can compute in, or its name, not {dtype}")
        return named
    found = getattr(config, "dtype", None)
    if isinstance(found, str):
        found = getattr(torch, found)
    if isinstance(found, torch.dtype):
        return found
    floats = (dtypes.TORCH[info.dtype_name] for info in checkpoint.tensors.values() if info.quantizable)
    return next(floats, None) or torch.float32


def _model_class(config: Any, checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """The class that the config names; the causal language model of its type where it names none."""
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code and auto_map:
        name = next((n for n in ("AutoModelForCausalLM", "AutoModel") if n in auto_map), "AutoModelForCausalLM")
        return getattr(transformers, name)
    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModelForCausalLM


def _compute_buffers(model: Any) -> None:
    """Recompute buffers (rotary and position tables) outside of the model's half-precision default dtype.

    ``from_config`` builds them under it, ``from_pretrained`` does not: GPT-J's sines would be wrong by most of 1.
    """
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


# -- plan -------------------------------------------------------------------------------------------------------------


def plan_model(
    model: Any,
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: str | Callable[[str], str] = "cpu",
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    *,
    strict: bool = True,
) -> Plan:
    """Decide what becomes of every parameter of a model whose parameters are on meta, before modules are swapped."""
    problems: list[str] = []
    found, unexpected = trace(model, checkpoint, problems)
    expected = model.state_dict()
    tied = _tied(model)
    for name, tensor in expected.items():
        if name in found:
            if not found[name].pieces and tensor.numel():
                continue  # its missing sources have been named
            shape = tuple(found[name].shape)
            if shape != tuple(tensor.shape):
                hint = " (transposed?)" if shape == tuple(reversed(tensor.shape)) and len(shape) == 2 else ""
                sources = ", ".join(sorted({piece.src_name for piece in found[name].pieces})[:3])
                problems.append(
                    f"misshapen: {name} is {list(tensor.shape)} in the model, {sources} make it {list(shape)}{hint}"
                )
            elif problem := coverage_problem(shape, found[name].pieces):
                problems.append(f"{name} {list(shape)}: {problem}")
            problems += _wrong_dtypes(name, tensor.dtype, found[name], checkpoint)
        elif name not in tied or not ({*tied[name], name} & found.keys()):
            problems.append(f"missing: no checkpoint tensor makes {name} {list(tensor.shape)}")
    ignorable = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unused = {}
    for name in unexpected:
        if any(pattern.search(name) for pattern in ignorable):
            unused[name] = "this architecture ignores it"
        elif not strict:
            unused[name] = "the model has no place for it (strict=False)"
        else:
            problems.append(f"unexpected: the model has no place for {name} {list(checkpoint.tensors[name].shape)}")
    advice = (
        "Is this the checkpoint of that architecture? strict=False passes over unexpected tensors; missing ones never."
    )
    raise_problems(CoverageError, f"{checkpoint.path} into {type(model).__name__}", problems, advice)

    facts = _facts(model)
    fp32 = _kept_in_fp32(model)
    targets = []
    for name, symbolic in found.items():
        fact = facts.get(name, _Fact("buffer"))
        if name in tied and fact.kind in kinds.QUANTIZABLE:
            fact = _Fact(f"tied to {min(tied[name] - {name}, default=name)}")
        dtype = torch.float32 if fp32 and fp32.search(name) else expected[name].dtype
        kind = fact.kind
        if dtype == torch.float32 and expected[name].dtype != torch.float32:
            kind = "kept in fp32 by the model"
        where = device if isinstance(device, str) else device(name)
        pieces = tuple(symbolic.pieces)
        targets.append(Target(name, tuple(symbolic.shape), dtype, kind, pieces, where, fact.keep, fact.transposed))
    others: dict[str, int] = {}
    for name, buffer in model.named_buffers():
        if name not in found:
            where = device if isinstance(device, str) else device(name)
            others[where] = others.get(where, 0) + buffer.nbytes
    return make_plan(checkpoint, targets, recipe, staging_bytes, unused=unused, other_bytes=others)


def trace(model: Any, checkpoint: Checkpoint, problems: list[str]) -> tuple[dict[str, Symbolic], list[str]]:
    """Run transformers' loading on symbolic tensors: (parameter -> symbolic, unexpected keys).

    Follows ``convert_and_load_state_dict_in_model``, with its fall-backs.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    jobs: dict[str, Any] = {}
    unexpected = []
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            unexpected.append(key)
            continue
        if pattern is None:
            job, pattern = jobs.setdefault(name, WeightRenaming(key, name)), key
        else:
            job = jobs.setdefault(name, deepcopy(by_pattern[pattern]))
        info = checkpoint.tensors[key]
        if isinstance(job, WeightRenaming) and job.collected_tensors:
            other = next(iter(job.collected_tensors))
            problems.append(f"duplicate: {other} and {key} both make {name}")
            continue
        job.add_tensor(name, key, pattern, Symbolic.source(key, info.shape, info.dtype))
    found: dict[str, Symbolic] = {}
    for first, job in jobs.items():
        sources = sorted((key for keys in job.layer_targets.values() for key in keys), key=dot_natural_key)
        holes = _holes(sources) if isinstance(job, WeightConverter) else []
        if holes:
            problems += [f"missing: {name}, one of the tensors that make {first}" for name in holes]
            found[first] = Symbolic(expected[first].shape, expected[first].dtype, [])
            continue
        try:
            made = job.convert(first, model=model, config=model.config)
        except NotMovementError as error:
            problems.append(f"{first}: transformers computes it from {sources[0]}...: {error}")
            continue
        except Exception as error:  # a converter given tensors that don't fit fails in its own way
            problems.append(f"misshapen: {', '.join(sources[:4])} can't be made into {first}: {error}")
            continue
        for name, value in made.items():
            symbolic = value[0] if isinstance(value, list) else value
            if name in expected:
                found[name] = symbolic
    return found, unexpected


def _holes(names: Iterable[str]) -> list[str]:
    """Members that are missing from numbered series, such as one of ``experts.0.up``, ``experts.1.up``, ...

    Series that are made into one parameter run alongside: each must have every number that any of them has, from 0.
    """
    series: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        parts = name.split(".")
        template = ".".join("*" if part.isdigit() else part for part in parts)
        series.setdefault(template, set()).add(tuple(int(part) for part in parts if part.isdigit()))
    if len({len(numbers) for found in series.values() for numbers in found}) != 1:
        return []  # not alongside each other
    every = set().union(*series.values())
    columns = [set(column) for column in zip(*every, strict=True)]
    # a number that is the same in all names (the layer's) is no series
    ranges = [sorted(column) if len(column) == 1 else range(max(column) + 1) for column in columns]
    missing = []
    for template, found in series.items():
        for numbers in itertools.product(*ranges):
            if numbers not in found:
                digits = iter(numbers)
                missing.append(".".join(str(next(digits)) if part == "*" else part for part in template.split(".")))
    return missing


def _wrong_dtypes(name: str, wanted: torch.dtype, symbolic: Symbolic, checkpoint: Checkpoint) -> list[str]:
    """Sources that are no floating-point weights, where the model wants some (FP8 without its scale, say)."""
    if wanted not in dtypes.QUANTIZABLE:
        return []
    plain = {*dtypes.QUANTIZABLE, torch.float64}
    sources = {piece.src_name for piece in symbolic.pieces}
    return [
        f"{source} is {checkpoint.tensors[source].dtype_name}, the model wants {dtypes.short(wanted)} for {name}: "
        "not a bf16, fp16 or fp32 checkpoint"
        for source in sorted(sources)
        if dtypes.TORCH[checkpoint.tensors[source].dtype_name] not in plain
    ]


def _tied(model: Any) -> dict[str, set[str]]:
    """Parameter -> the names that share its storage once tied."""
    groups: dict[str, set[str]] = {}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        group = groups.get(name, {name}) | groups.get(source, {source})
        for member in group:
            groups[member] = group
    return groups


def _kept_in_fp32(model: Any) -> re.Pattern[str] | None:
    dtype_plan = model._get_dtype_plan(model.dtype)
    patterns = [pattern.replace("*", ".*") for pattern, dtype in dtype_plan.items() if dtype == torch.float32]
    return re.compile("|".join(f"(?:{p})" for p in patterns)) if patterns else None


@dataclass(frozen=True)
class _Fact:
    kind: str
    transposed: bool = False
    keep: str | None = None


def _facts(model: Any) -> dict[str, _Fact]:
    """What each parameter is, asked from its module."""
    facts = {}
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, parameter in module.named_parameters(recurse=False):
            name = prefix + leaf
            keep = "output head" if module is head else None
            if parameter.dtype not in dtypes.QUANTIZABLE or leaf.endswith("_scale"):
                facts[name] = _Fact("quantized already")
            elif _is_linear(module) and leaf == "weight":
                parent, _, child = path.rpartition(".")
                read = _reads_weight(type(model.get_submodule(parent)), child)  # type: ignore[arg-type]
                facts[name] = _Fact("its weight is read by another module" if read else kinds.LINEAR, keep=keep)
            elif is_experts(module) and leaf in _STACKS and parameter.ndim == 3:
                facts[name] = _Fact(kinds.EXPERTS, transposed=bool(module.is_transposed))
            elif leaf.endswith("bias"):
                facts[name] = _Fact("bias")
            elif parameter.ndim == 1:
                facts[name] = _Fact("vector")
            else:
                facts[name] = _Fact(f"{type(module).__name__}, not a linear layer", keep=keep)
    return facts


#: subclasses whose forward is that of a linear layer
_LINEAR_SUBCLASSES = frozenset({"FalconLinear"})


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or type(module).__name__ in _LINEAR_SUBCLASSES


@functools.cache
def _reads_weight(parent: Any, child: str) -> bool:
    """Whether a class uses ``self.child.weight`` itself, beside calling the layer: FP8 numbers would surprise it."""
    try:
        source = inspect.getsource(parent)
    except (OSError, TypeError):
        return False
    return re.search(rf"self\.{re.escape(child)}\.weight\b", source) is not None


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' ``use_experts_implementation`` made this class: its flags tell how to run it."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "_apply_gate", "down_proj"))


# -- swap and assign --------------------------------------------------------------------------------------------------


def swap(model: Any, plan: Plan) -> None:
    """Give every module that the plan quantizes its FP8 form, storage not yet assigned."""
    for placement in plan.quantized:
        assert placement.scheme is not None
        path, _, leaf = placement.name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            modules.quantize_linear(model, path, placement.scheme, placement.parts)
        else:
            modules.quantize_stack(module, leaf, placement.scheme, placement.shape, placement.parts)


def assign(model: Any, plan: Plan, storages: Mapping[str, Storage]) -> None:
    """Give the model's parameters and buffers their storage."""
    for placement in plan.placements:
        storage = storages[placement.name]
        _set(model, placement.name, storage.weight, trainable=placement.scheme is None)
        if storage.scale is not None:
            _set(model, modules.scale_name(placement.name), storage.scale)


def _set(model: Any, name: str, tensor: torch.Tensor, trainable: bool = False) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
        return
    parameter = nn.Parameter(tensor, requires_grad=trainable and tensor.dtype in dtypes.QUANTIZABLE)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    module._parameters[leaf] = parameter


def _finish(model: Any, checkpoint: Checkpoint, device: torch.device) -> None:
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[leaf] = buffer.to(device)
    model.tie_weights()
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"planned, but not filled: {left[:5]}"
