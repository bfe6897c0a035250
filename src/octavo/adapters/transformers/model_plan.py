"""The plan of a transformers model: where every checkpoint element goes, and what becomes of every parameter.

How checkpoint tensors become parameters (stacking experts, fusing gate and up, transposing, renaming) is transformers'
knowledge, and none of it is repeated here. Its own conversion mapping is run on symbolic tensors, which have no values
but know where each of their elements comes from.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from ...checkpoint import dtypes
from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.header import TensorInfo
from ...choices import DEFAULT_STAGING_BYTES
from ...elements.boxes import coverage_problem
from ...elements.pieces import Piece
from ...elements.symbolic import NotMovementError, Symbolic
from ...errors import MAX_PROBLEMS_SHOWN, CoverageError, raise_problems, reading
from ...planning import kinds
from ...planning.placement import Target
from ...planning.plan import Plan, check_unquantized, make_plan
from ...planning.recipe import Recipe
from ...text import some, told
from .excused import computed, new_heads, unneeded
from .facts import Fact, facts_of

#: a part of a name that is a number
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def plan_model(
    model: Any,
    checkpoint: Checkpoint,
    recipe: Recipe,
    device: str | Callable[[str], str] = "cpu",
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    *,
    strict: bool = True,
    heads: bool = False,
) -> Plan:
    """Decide what becomes of every parameter of a model on meta, whose modules are not swapped yet.

    Parameters that are computed, and in no checkpoint, get their values.

    Args:
        device: where the model goes, or a function from a parameter's name to its device.
        strict: whether checkpoint tensors that the model has no place for are an error.
        heads: whether a head may be missing that the model's class adds to what was saved; it stays on meta.

    Raises:
        CoverageError: with all tensors that are missing, unexpected, misshapen, or there twice.
    """
    check_unquantized(checkpoint, recipe)
    problems: list[str] = []
    with reading(checkpoint.path):  # transformers takes some names for numbers that Python does not
        traced = trace(model, checkpoint.tensors, problems)
    found, unexpected = traced.found, traced.unexpected
    problems += [
        f"{name}: transformers computes it from {min(sources, key=dot_natural_key)}...: {why}"
        for name, (sources, why) in traced.computed.items()
    ]
    tied = tied_names(model)
    expected = model.state_dict()
    missing = [name for name in expected if name not in found and not tied.get(name, set()) & found.keys()]
    made = computed(model, missing)
    new = new_heads(model, missing) if heads else []
    problems += (
        f"missing: no checkpoint tensor makes {name} {list(expected[name].shape)}"
        for name in missing
        if name not in made and name not in new
    )
    problems += _misfits(model, checkpoint, found)
    needless = unneeded(model, unexpected, checkpoint.tensors)
    homeless = [name for name in unexpected if name not in needless]
    fewer = _fewer(homeless, checkpoint.tensors.keys() - unexpected)
    if strict:
        problems += [
            f"unexpected: the model has no place for {name} {list(checkpoint.tensors[name].shape)}" for name in homeless
        ]
    advice = (
        "Is this the checkpoint of that architecture? octavo.load(..., strict=False) passes over unexpected tensors; "
        f"missing ones never.{fewer}{prefix_hint(model, unexpected)}"
    )
    raise_problems(CoverageError, f"{checkpoint.path} into {type(model).__name__}", problems, advice)

    for name, values in made.items():
        put(model, name, values)
    device_of = device if callable(device) else lambda _: device
    targets = _targets(model, found, tied, device_of)
    others: Counter[str] = Counter()
    for name, tensor in (*model.named_buffers(), *((name, expected[name]) for name in new)):
        if name not in found and name not in made:
            others[device_of(name)] += tensor.nbytes
    for name, values in made.items():
        others[device_of(name)] += values.nbytes
    unused = {name: needless.get(name, "the model has no place for it (strict=False)") for name in unexpected}
    plan = make_plan(checkpoint, targets, recipe, staging_bytes, unused=unused, other_bytes=others, covered=True)
    named = [f"{name} is new: the checkpoint has none. It is initialised, and has to be trained" for name in new]
    if homeless:
        named.append(
            f"passed over, since the model has no place for them: {len(homeless):,} tensors ({some(homeless)}).{fewer}"
        )
    return replace(plan, remarks=(*plan.remarks, *named))


def _fewer(homeless: Collection[str], used: Collection[str]) -> str:
    """What to say where tensors without a place are called as others are that have one, but for their numbers."""
    templates = {_NUMBER.sub("*", name) for name in used}
    cut = sum("*" in (template := _NUMBER.sub("*", name)) and template in templates for name in homeless)
    if not cut:
        return ""
    return f" {cut:,} of these differ from others in a number alone: config.json may have fewer layers than the files."


def prefix_hint(model: Any, unexpected: Collection[str]) -> str:
    """What to do about names that begin with more than the model's own."""
    expected, parts = model.state_dict().keys(), next(iter(unexpected), "").split(".")
    for count in range(1, len(parts)):
        prefix = ".".join(parts[:count]) + "."
        fitting = sum(name.startswith(prefix) and name.removeprefix(prefix) in expected for name in unexpected)
        if 2 * fitting > len(unexpected):
            return f" Names begin with {prefix!r}: without it, {fitting} of them are the model's. Rename them."
    return ""


def put(model: Any, name: str, values: torch.Tensor) -> None:
    """Give a parameter or buffer its values."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = values
        return
    parameter = nn.Parameter(values, requires_grad=module._parameters[leaf].requires_grad)
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    module._parameters[leaf] = parameter


def _misfits(model: Any, checkpoint: Checkpoint, found: Mapping[str, Symbolic]) -> Iterator[str]:
    """Parameters that come out otherwise than the model wants them."""
    for name, tensor in model.state_dict().items():
        if name not in found or (not found[name].pieces and tensor.numel()):
            continue  # what is missing, and its sources, have been named
        shape = tuple(found[name].shape)
        if shape != tuple(tensor.shape):
            hint = " (transposed?)" if shape == tuple(reversed(tensor.shape)) and len(shape) == 2 else ""
            sources = ", ".join(sorted({piece.src_name for piece in found[name].pieces})[:3])
            yield f"misshapen: {name} is {list(tensor.shape)} in the model, {sources} make it {list(shape)}{hint}"
        elif problem := coverage_problem(shape, found[name].pieces):
            yield f"{name} {list(shape)}: {problem}"
        yield from _wrong_dtypes(name, tensor.dtype, found[name], checkpoint)


def _targets(
    model: Any, found: Mapping[str, Symbolic], tied: Mapping[str, set[str]], device_of: Callable[[str], str]
) -> list[Target]:
    """Every parameter that is made: what it is, where it goes, and the pieces that make it."""
    facts, expected, fp32 = facts_of(model), model.state_dict(), kept_in_fp32(model)
    targets = []
    for name, symbolic in found.items():
        fact, dtype = facts.get(name, Fact("buffer")), expected[name].dtype
        kind = fact.kind
        if name in tied and kind in kinds.QUANTIZABLE:
            kind = f"tied to {min(tied[name] - {name}, default=name)}"
        if dtype != torch.float32 and fp32 and fp32.search(name):
            dtype, kind = torch.float32, "kept in fp32 by the model"
        shape, pieces = tuple(symbolic.shape), tuple(symbolic.pieces)
        apart = _apart(symbolic, fact.stack.apart) if fact.stack and fact.stack.apart else None
        targets.append(Target(name, shape, dtype, kind, pieces, device_of(name), fact.keep, fact.transposed, apart))
    return targets


def _apart(symbolic: Any, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[Piece, ...]]:
    """A matrix of all experts' rows as the stack that it is: its shape and pieces."""
    return shape, tuple(symbolic.view(shape).pieces)


@dataclass
class Traced:
    """Where transformers would put the tensors of a checkpoint."""

    found: dict[str, Symbolic] = field(default_factory=dict)  # parameter -> the symbolic tensor that it becomes
    unexpected: list[str] = field(default_factory=list)  # tensors that become no parameter
    computed: dict[str, tuple[list[str], str]] = field(default_factory=dict)  # parameter -> its sources, the operation


def symbolic_source(info: TensorInfo) -> torch.Tensor:
    """All of a checkpoint tensor, without data."""
    return Symbolic.source(info.name, info.shape, info.dtype)


def trace(
    model: Any,
    tensors: Mapping[str, TensorInfo],
    problems: list[str],
    quantizer: Any = None,
    source_of: Callable[[TensorInfo], Any] = symbolic_source,
) -> Traced:
    """Run transformers' loading on symbolic tensors.

    It goes as ``convert_and_load_state_dict_in_model`` does, with its fall-backs. What is wrong is added to
    ``problems``.

    Args:
        quantizer: transformers' ``HfQuantizer``, if it would load them through one.
        source_of: makes the tensors that stand for those of the checkpoint.
    """
    mapping = conversions_of(model, quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected, prefix = model.state_dict(), model.base_model_prefix
    jobs: dict[str, Any] = {}
    plain: dict[str, str] = {}
    traced = Traced()
    found = traced.found
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        if name not in expected:
            traced.unexpected.append(key)
            continue
        info = tensors[key]
        source = source_of(info)
        if name in plain or (pattern is None and name in jobs):
            other = plain.get(name) or min(itertools.chain.from_iterable(jobs[name].layer_targets.values()))
            problems.append(f"duplicate: {other} and {key} both make {name}")
        elif pattern is None:  # transformers makes a converter of each of these, too, and compiles an expression for it
            plain[name], found[name] = key, source
        else:
            if name not in jobs:  # a stack has a hundred members, and copying takes a while
                jobs[name] = deepcopy(by_pattern[pattern])
            jobs[name].add_tensor(name, key, pattern, source)
    made_of: dict[str, str] = dict(plain)  # parameter -> one of its sources
    for first, job in jobs.items():
        sources = [key for keys in job.layer_targets.values() for key in keys]
        holes = _holes(sources) if quantizer is None else []  # a scale may be missing where its weight is unquantized
        if holes:
            problems += [f"missing: {name}, one of the tensors that make {first}" for name in holes]
            found[first] = Symbolic(expected[first].shape, expected[first].dtype, [])
            continue
        try:
            made = job.convert(first, model=model, config=model.config, hf_quantizer=quantizer)
        except NotMovementError as error:
            traced.computed[first] = (sources, str(error))
            continue
        except Exception as error:  # given tensors that don't fit, each converter fails in its own way
            some = sorted(sources, key=dot_natural_key)[:4]
            problems.append(f"misshapen: {', '.join(some)} can't be made into {first}: {told(error)}")
            continue
        for name, value in made.items():
            symbolic = value[0] if isinstance(value, list) else value
            if name in made_of:
                other = min(sources, key=dot_natural_key)
                problems.append(f"duplicate: {made_of[name]} and {other}... both make {name}")
            elif name in expected and source_of is symbolic_source and not isinstance(symbolic, Symbolic):
                traced.computed[name] = (sources, "of their shapes alone")
            elif name in expected:
                found[name], made_of[name] = symbolic, sources[0]
    return traced


def conversions_of(model: Any, quantizer: Any = None) -> list[Any]:
    """What transformers says of how tensors of a checkpoint become a model's parameters."""
    return get_model_conversion_mapping(model, None, quantizer)


def _holes(names: Iterable[str]) -> list[str]:
    """Names that are missing from numbered series: ``experts.1.up``, where there are ``experts.0.up`` and ``.2.up``.

    Series that become one parameter (all gates, all ups) run alongside each other: each must have every number that any
    of them has, from 0.
    """
    series: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        numbers = tuple(map(int, _NUMBER.findall(name)))
        series.setdefault(_NUMBER.sub("*", name), set()).add(numbers)
    if len({len(numbers) for found in series.values() for numbers in found}) != 1:
        return []  # these don't run alongside each other
    every = set().union(*series.values())
    columns = [set(column) for column in zip(*every, strict=True)]
    # a number that is the same in all names, as the layer's is, makes no series
    ranges = [range(max(column), max(column) + 1) if len(column) == 1 else range(max(column) + 1) for column in columns]
    missing = []
    for template, found in series.items():
        absent = math.prod(numbers.stop - numbers.start for numbers in ranges) - len(found)
        # a name may hold any number: of billions that are missing, no more are listed than are shown
        gone = (numbers for numbers in _combinations(ranges) if numbers not in found)
        for numbers in itertools.islice(gone, min(absent, MAX_PROBLEMS_SHOWN)):
            digits = iter(numbers)
            missing.append(".".join(str(next(digits)) if part == "*" else part for part in template.split(".")))
    return missing


def _combinations(ranges: Sequence[range]) -> Iterator[tuple[int, ...]]:
    """As `itertools.product`, which makes lists of all ranges first, however long they are."""
    if not ranges:
        yield ()
        return
    for first in ranges[0]:
        for others in _combinations(ranges[1:]):
            yield (first, *others)


def _wrong_dtypes(name: str, wanted: torch.dtype, symbolic: Symbolic, checkpoint: Checkpoint) -> list[str]:
    """Sources that are no weights in bf16, fp16, fp32 or fp64, where the model wants such: FP8 without a scale, say."""
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


def tied_names(model: Any) -> dict[str, set[str]]:
    """Parameter -> all names of the weight that it is tied to, its own included."""
    groups: dict[str, set[str]] = {}
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        group = groups.get(name, {name}) | groups.get(source, {source})
        for member in group:
            groups[member] = group
    return groups


def kept_in_fp32(model: Any) -> re.Pattern[str] | None:
    """A pattern for the parameters that a model in half precision has in fp32 all the same."""
    dtype_plan = model._get_dtype_plan(model.dtype)
    patterns = sorted(pattern.replace("*", ".*") for pattern, dtype in dtype_plan.items() if dtype == torch.float32)
    return re.compile("|".join(f"(?:{p})" for p in patterns)) if patterns else None
