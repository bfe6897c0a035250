"""transformers as the reader of a checkpoint in FP8: what its ``from_pretrained`` would make of it.

Nothing of transformers' knowledge is repeated here. Its model is built on meta, its quantizer gives the modules their
form, and its loading is run on symbolic tensors. Then every FP8 weight must have arrived beside its scale, in a
parameter that holds FP8; and every scale that the model waits for must have come. Where transformers computes weights
while it loads (stacks of experts that it dequantizes), it computes a small sample, which is compared.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers.quantizers.auto import AutoHfQuantizer

from ...checkpoint import dtypes
from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.header import TensorInfo
from ...conversion.formats import scheme_by_scale
from ...conversion.packing import DTYPES, PACKED
from ...conversion.proof import Judgement
from ...elements.pieces import Piece
from ...elements.symbolic import Symbolic
from ...errors import CheckpointError
from ...numerics import schemes
from ...numerics.schemes import Scheme
from ...quiet import loguru_quiet, this_thread_quiet
from ...text import told
from .displaced import displaced
from .excused import computed, unneeded
from .model_plan import Traced, kept_in_fp32, prefix_hint, tied_names, trace
from .samples import make_sample
from .skeleton import skeleton

NAME = f"transformers {transformers.__version__}"


class TransformersReader:
    """See `octavo.conversion.proof.Reader`."""

    def judge(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, TensorInfo],
        scales: Mapping[str, str],
        config: Mapping[str, Any],
    ) -> Judgement:
        try:
            model = skeleton(checkpoint)
        except CheckpointError as error:
            return Judgement(NAME, unproved=str(error))
        try:
            quantizer = _prepare(model, config)
        except ImportError as error:
            return Judgement(NAME, unproved=str(error).partition(":")[0])
        except Exception as error:  # of modules that can't hold FP8, which it will be told to leave alone
            plain = skeleton(checkpoint)
            waiting = _unquantized_modules(plain, tensors, scales)
            return Judgement(NAME, waiting=waiting, unproved=f"it refuses: {type(error).__name__}: {error}")
        problems: list[str] = []
        try:
            with loguru_quiet("compressed_tensors"):
                traced = trace(model, tensors, problems, quantizer)
        except Exception as error:  # of a model's way to load that does not go together with its quantizer
            return Judgement(NAME, refused=dict.fromkeys(scales, f"{type(error).__name__}: {told(error)}"))
        case = _Case(model, quantizer, tensors, scales, traced)
        judgement = case.judgement(problems)
        homeless = {*scales} & {*traced.unexpected}
        if homeless and (wrong := displaced(skeleton(checkpoint), homeless, tensors)):
            judgement = replace(judgement, misread={**judgement.misread, **wrong}, unproved="")
        if not case.splits:
            return judgement
        return replace(judgement, caveats=_dequantized(checkpoint, config, case))


def _dequantized(checkpoint: Checkpoint, config: Mapping[str, Any], case: _Case) -> tuple[str, ...]:
    """What becomes of tensors that the model splits if transformers is told to dequantize."""
    tensors = {name: case.tensors[name] for source in case.splits for name in (source, case.scales[source])}
    scales = {source: case.scales[source] for source in case.splits}
    model = skeleton(checkpoint)
    problems: list[str] = []
    try:
        quantizer = _prepare(model, config, dequantize=True)
        found = _Case(model, quantizer, tensors, scales, trace(model, tensors, problems, quantizer)).judgement(problems)
    except Exception as error:
        return (f"it can't load what its model splits with dequantize=True: {type(error).__name__}: {told(error)}",)
    wrong = {**found.misread, **found.refused}
    if not wrong:
        return ()
    return (f"{len(wrong)} tensors that its model splits ({min(wrong)}) are read right only without dequantize=True",)


def _prepare(model: Any, config: Mapping[str, Any], dequantize: bool | None = None) -> Any:
    """Give a model's modules the form that its quantizer gives them, and return the quantizer, if it has one."""
    part = model.config.get_text_config(decoder=True)
    quantization = config.get("quantization_config") or getattr(part, "quantization_config", None)
    if quantization is None:
        return None
    asked = {} if dequantize is None else {"dequantize": dequantize}
    quantizer = AutoHfQuantizer.from_config({**deepcopy(dict(quantization)), **asked}, pre_quantized=True)
    # the environment that counts is that of whoever loads the checkpoint; where FP8 can't run, all is dequantized
    said = getattr(quantizer.quantization_config, "dequantize", None)
    with this_thread_quiet():
        quantizer.validate_environment(device_map={"": "cpu"}, weights_only=True)
        if said is not None:
            quantizer.quantization_config.dequantize = said
        quantizer.preprocess_model(
            model=model, dtype=model.dtype, device_map=None, checkpoint_files=None, use_kernels=False
        )
    return quantizer


def _unquantized_modules(model: Any, tensors: Mapping[str, TensorInfo], scales: Mapping[str, str]) -> tuple[str, ...]:
    """Linear layers of an unquantized model that are made of unquantized tensors alone, or of none."""
    is_scale = frozenset(scales.values())
    weights = {name: tensor for name, tensor in tensors.items() if name not in is_scale}
    found = trace(model, weights, []).found
    return tuple(
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not any(piece.src_name in scales for piece in getattr(found.get(f"{path}.weight"), "pieces", ()))
    )


class _Case:
    """One checkpoint before one model."""

    def __init__(
        self,
        model: Any,
        quantizer: Any,
        tensors: Mapping[str, TensorInfo],
        scales: Mapping[str, str],
        traced: Traced,
    ) -> None:
        self.model, self.quantizer, self.tensors, self.scales, self.traced = model, quantizer, tensors, scales, traced
        self.weight_of = {scale: weight for weight, scale in scales.items()}
        self.expected: Mapping[str, torch.Tensor] = model.state_dict()
        self.in_fp32 = kept_in_fp32(model)
        self.splits: set[str] = set()  # quantized tensors that make several parameters
        self.samples: dict[Any, str | Exception | None] = {}
        self.errors: list[tuple[list[str], str]] = []  # tensors that can't be loaded together, and why

    def judgement(self, problems: list[str]) -> Judgement:
        unexpected = set(self.traced.unexpected)
        arrived: dict[str, str | None] = {}  # quantized tensor -> what is wrong with where it arrived
        for name, symbolic in self.traced.found.items():
            for source, why in self._look(name, symbolic):
                if source in arrived:
                    self.splits.add(source)
                arrived[source] = arrived.get(source) or why
        for name, (sources, operation) in self.traced.computed.items():
            why = self._sample(name, sources, operation)
            arrived.update({source: arrived.get(source) or why for source in sources if source in self.scales})
        if self.scales and unexpected.issuperset(self.scales):
            kind = type(self.model).__name__
            what = f"its {kind} has no place for {min(self.scales)}, nor for any other quantized tensor"
            what += prefix_hint(self.model, sorted(unexpected)).replace(" Names", ". Names", 1).rstrip(".")
            return Judgement(NAME, unexpected=tuple(sorted(self.scales)), unproved=what)
        for source, why in self._shared():
            arrived[source] = arrived.get(source) or why
        refused = {name: why for sources, why in self.errors for name in sources if name in self.scales}
        misread = {name: why for name, why in arrived.items() if why and name not in refused}
        modules = {
            piece.src_name: name.removesuffix(".weight")
            for name in self.traced.found
            for piece in self._pieces(name)
            if piece.src_name in misread
        }
        for name in self.scales.keys() - arrived.keys() - unexpected:
            refused[name] = problems[0] if problems else "it finds no place for it"
        waiting, missing = self._absent()
        homeless = unexpected - unneeded(self.model, unexpected, self.tensors).keys()
        return Judgement(NAME, misread, waiting, modules, refused, missing, tuple(sorted(homeless)))

    def _absent(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(modules whose scale nothing makes, other parameters that nothing makes)."""
        made = self.traced.found.keys() | self.traced.computed.keys()
        tied = tied_names(self.model)
        waiting, missing = set(), set()
        for name in self.expected.keys() - made:
            weight = _weight_of(name)
            weight = weight and next((n for n in (weight, weight + PACKED) if n in self.expected), None)
            if weight is None or self.expected[weight].dtype not in (*schemes.NUMBERS, *DTYPES):
                if not tied.get(name, set()) & made:
                    missing.add(name)
            elif not any(piece.src_name in self.scales for piece in self._pieces(weight)):
                waiting.add(_module_of(weight))
        missing -= computed(self.model, missing).keys()
        return tuple(sorted(waiting)), tuple(sorted(missing))

    def _shared(self) -> Iterator[tuple[str, str]]:
        """(quantized tensor, what is wrong) for weights that a parameter without a scale shares."""
        tied = tied_names(self.model)
        made = self.traced.found.keys() | self.traced.computed.keys()
        for name in (tied.keys() & self.expected.keys()) - made:
            if any(tied.get(scale, set()) & made for scale in _scale_names(name)):
                continue
            for piece in (piece for other in tied[name] for piece in self._pieces(other)):
                if piece.src_name in self.scales:
                    yield piece.src_name, f"{_template(name)} shares it, and has no scale of its own"

    def _pieces(self, name: str) -> Sequence[Piece]:
        symbolic = self.traced.found.get(name)
        return symbolic.pieces if symbolic is not None else ()

    # -- weights that transformers moves ------------------------------------------------------------------------------

    def _look(self, name: str, symbolic: Symbolic) -> Iterator[tuple[str, str | None]]:
        """(quantized tensor, what is wrong or None) for all that make the parameter ``name``."""
        sources = _by_source(symbolic.pieces)
        quantized = [source for source in sources if source in self.scales]
        here = self.expected[name]
        if tuple(symbolic.shape) != tuple(here.shape):
            of_scales = [self.weight_of[source] for source in sources if source in self.weight_of]
            self.errors.append(
                (quantized + of_scales, f"{name} is {list(here.shape)} there, not {list(symbolic.shape)}")
            )
            return
        if not quantized:
            yield from self._mistaken(name, sources)
            return
        others = [source for source in sources if source not in self.scales]
        beside = _by_source(next((pieces for q in _scale_names(name) if (pieces := self._pieces(q))), ()))
        for source in quantized:
            module = self.model.get_submodule(name.rpartition(".")[0])
            if here.dtype != self.tensors[source].dtype:
                kind = type(module).__name__
                yield source, f"it takes the codes for weights: its {kind} holds {dtypes.short(here.dtype)}"
            elif isinstance(module, torch.nn.Embedding):
                yield source, "it is in an Embedding, which can't look up codes"
            elif self.in_fp32 is not None and self.in_fp32.search(name):
                yield source, f"its model keeps {_template(name)} in float32, and takes the codes for weights"
            elif others:
                yield source, f"it makes one parameter of it and of {others[0]}, which is not quantized"
            elif not self._scaled(name, source, sources[source], beside.get(self.scales[source], ())):
                yield source, "its scale does not arrive beside it"
            else:
                yield source, None

    def _mistaken(self, name: str, sources: Iterable[str]) -> Iterator[tuple[str, str]]:
        """(tensor, what is wrong) for what arrives in numbers of another kind than its module holds."""
        here, weight = self.expected[name].dtype, _weight_of(name)
        scaled = any(self._pieces(scale) for scale in _scale_names(name))
        for source in sources:
            stored = self.tensors[source].dtype
            if here in schemes.NUMBERS and scaled and stored not in (here, torch.float8_e5m2):
                yield source, f"it is {dtypes.short(stored)}, and read as {schemes.NUMBERS[here].name} with a scale"
            elif weight is not None and source in self.weight_of and (stored in _FLOATS) != (here in _FLOATS):
                why = f"its scale is {dtypes.short(stored)}, and read as {dtypes.short(here)}"
                yield self.weight_of[source], why

    def _scaled(self, name: str, source: str, pieces: Sequence[Piece], beside: Sequence[Piece]) -> bool:
        """Return True if every element of these pieces has the scale that it has on disk, in a piece ``beside`` it."""
        shape, scale = self.tensors[source].shape, self.tensors[self.scales[source]]
        scheme, rows = scheme_by_scale(shape, scale), self.expected[name].shape[-2]
        cells = scale.shape[-1] if len(scale.shape) > 1 else 1
        return all(any(_agree(shape, scheme, rows, p, q, cells) for q in beside) for p in pieces)

    # -- weights that transformers computes ---------------------------------------------------------------------------

    def _sample(self, name: str, sources: list[str], operation: str) -> str | None:
        """What is wrong with how transformers computes a parameter of quantized tensors, seen on a few of them."""
        weights = [s for s in sources if s not in self.weight_of]
        mixed = {_template(s) for s in weights if s in self.scales} & {
            _template(s) for s in weights if s not in self.scales
        }
        if mixed:
            return f"it makes one parameter of {min(mixed)}, of which only some are quantized"
        sample = _first_of_each(sources)
        key = (_template(name), *((_template(s), self.tensors[s].shape, self.tensors[s].dtype_name) for s in sample))
        if key not in self.samples:
            try:
                self.samples[key] = self._compare(name, sample)
            except Exception as error:  # whatever transformers raises on its own operations
                self.samples[key] = error
        found = self.samples[key]
        if isinstance(found, Exception):
            self.errors.append((sources, f"{_template(name)}: {type(found).__name__}: {found}"))
            return None
        return found

    def _compare(self, name: str, sources: list[str]) -> str | None:
        sample = make_sample(sources, self.tensors, self.scales)
        if sample is None:
            return "its scale is of no scheme that is known"
        got = _loaded(self.model, {s: sample.infos[s] for s in sample.given}, sample.given, self.quantizer)
        want = _loaded(self.model, {s: sample.infos[s] for s in sample.meant}, sample.meant)
        for target, tensor in want.items():
            if target not in got or got[target].shape != tensor.shape:
                return f"it makes {_template(target)} of another shape"
            difference = (got[target].float() - tensor.float()).abs().max().item()
            if not difference <= _TOLERANCE * tensor.float().abs().max().item():
                return f"it computes {_template(target)} wrong"
        return None


#: what one scale of numbers is cast to another by value; bits of e8m0 are none of them
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: of the largest weight: what is computed in bf16 is off by a hundredth, and a wrong scale by far more
_TOLERANCE = 0.02


def _loaded(
    model: Any, infos: Mapping[str, TensorInfo], given: Mapping[str, torch.Tensor], quantizer: Any = None
) -> Mapping[str, torch.Tensor]:
    """The parameters that transformers makes of real tensors."""
    problems: list[str] = []
    traced = trace(model, infos, problems, quantizer, lambda info: given[info.name])
    if problems or traced.computed:
        raise ValueError(problems[0] if problems else next(iter(traced.computed.values()))[1])
    return traced.found


def _scale_names(name: str) -> tuple[str, ...]:
    """The names under which transformers' modules keep the scale of a parameter."""
    name = name.removesuffix(PACKED)
    return (f"{name}_scale", f"{name}_scale_inv")


def _weight_of(name: str) -> str | None:
    """The inverse of `_scale_names`; None for what is no scale."""
    return next((name.removesuffix(end) for end in ("_scale", "_scale_inv") if name.endswith(end)), None)


def _by_source(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.src_name, []).append(piece)
    return found


def _module_of(weight: str) -> str:
    """The module that a scale belongs to: stacks of experts are parameters by names of their own."""
    return weight.removesuffix(".weight") if weight.endswith(".weight") else weight.rpartition(".")[0]


def _template(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _first_of_each(names: Iterable[str], count: int = 2) -> list[str]:
    """The first names of every numbered series, whatever order they come in."""
    series: dict[str, list[str]] = {}
    for name in names:
        series.setdefault(_template(name), []).append(name)
    return [
        name
        for _, members in sorted(series.items())
        for name in heapq.nsmallest(count, members, key=lambda n: (len(n), n))
    ]


def _agree(shape: Sequence[int], scheme: Scheme | None, rows: int, weight: Piece, scale: Piece, cells: int) -> bool:
    """Return True if ``scale`` brings the scales of ``weight`` to where their weights go.

    Args:
        shape: of the weight on disk.
        rows: of the parameter.
        cells: columns of the scale on disk.
    """
    lead = len(weight.size) - 2
    if weight.dst_off[:lead] != scale.dst_off[:lead] or weight.size[:lead] != scale.size[:lead]:
        return False
    if scheme is None:  # unknown, so it has to stay as it is
        return weight.size[lead:] == tuple(shape[-2:]) and weight.dst_off[lead:] == (0, 0)
    if any(
        n > 1 and a != b for n, a, b in zip(weight.size[lead:], weight.src_strides[lead:], (shape[-1], 1), strict=True)
    ):
        return False  # transposed
    begin = divmod(weight.src_off % math.prod(shape[-2:]), shape[-1])
    along = list(
        zip(weight.dst_off[lead:], begin, weight.size[lead:], (scheme.group_rows, scheme.group_cols), strict=True)
    )
    if scheme.group_rows is None:
        return weight.size[-2] == rows == shape[-2]
    at = divmod(scale.src_off, cells)
    for axis, (to, source, length, group) in enumerate(along):
        whole = length if group is None else group
        if to % whole or source % whole:
            return False
        first, there = to // whole - scale.dst_off[lead + axis], source // whole - at[axis]
        if first != there or first < 0 or first + -(-length // whole) > scale.size[lead + axis]:
            return False
    return True
