"""The public functions, with every argument that they take. These are documented here, and nowhere else.

    load        a transformers model as FP8, while its checkpoint streams
    plan        what a load or a conversion would do, from headers alone
    convert     an FP8 checkpoint on disk
    verify      whether its bytes are right
    stream      an FP8 checkpoint that exists nowhere, tensor by tensor
    update      new weights for a loaded model, in place: in `octavo.api_models`, and here by name
    layerwise   a model that loads itself, quantized layer by layer: the same

`octavo.Recipe` and `octavo.OctavoConfig` document theirs themselves. What one function alone needs is imported when it
is called: who loads waits for no module that converts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checkpoint.checkpoint import Checkpoint
from .choices import AUTO, DEFAULT_FORMAT, DEFAULT_STAGING_BYTES
from .conversion.verified import VerifyReport
from .errors import CheckpointError, MissingExtraError, OutputError, of_user, public
from .machine import as_usual, usable_device
from .planning.plan import Plan, check_no_codes
from .planning.recipe import Recipe
from .streaming.checks import Checks
from .streaming.meter import collection_paused
from .streaming.report import Report

if TYPE_CHECKING:
    from .api_models import layerwise, update


@public(CheckpointError)
@as_usual()
@collection_paused()  # importing transformers' model code makes half a million objects, too
def load(
    path: str | os.PathLike[str],
    scheme: str | Recipe | Mapping[str, Any] | None = AUTO,
    device: str | torch.device = "cpu",
    *,
    ignore: Iterable[str] = (),
    dtype: torch.dtype | str | None = None,
    model_class: type[Any] | None = None,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    threads: int | None = None,
    strict: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    direct_io: bool | None = None,
    verify: bool = False,
    progress: bool | Callable[[int, int], None] | None = None,
) -> Any:
    """Load a transformers model as FP8 while its checkpoint streams.

    A weight ``bf16[out, in]`` becomes ``q: float8_e4m3fn[out, in]`` with a scale beside it (``w ≈ q.float() * scale``)
    and goes straight to its place in the model: memory never holds more than the FP8 model and ``staging_bytes``.
    Embeddings, norms, output heads, MoE routers and shared-expert gates stay as they are. A load that fails leaves no
    model behind.

    Args:
        path: A folder, a ``.safetensors`` file, or a hub id (``org/name``, which needs the extra ``hub``): weights in
            bf16, fp16 or fp32; or in FP8, MXFP4, NVFP4 or integers with scales, which are decoded (on a CPU); or what
            ``save_pretrained`` wrote of a model that octavo had loaded.
        scheme: ``"fp8_channel"`` (a scale for each row), ``"fp8_block"`` (for 128 x 128 elements), ``"fp8_tensor"``
            (for each matrix), ``"mxfp8"`` (for 32 columns of a row), ``"int8_channel"`` (for each row, and int8 in
            place of FP8) or ``"nvfp4"`` (for 16 columns of a row, and four bits). ``"auto"`` is ``"fp8_channel"``, and
            where the source is quantized already, what keeps its bytes. Or a `Recipe`, or its dict form, that chooses
            by name. None loads without quantizing, and what is quantized already as bf16.
        device: The device that the model goes to: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``torch.device(...)``.
        ignore: Patterns of weights to leave as they are, added to those of a recipe: names, globs or ``re:regex``.
        dtype: The dtype of what is not quantized, or its name. By default the config's, as in ``from_pretrained``.
        model_class: A transformers model class or auto class. By default the one that the config names.
        staging_bytes: A bound in bytes on memory beyond the model, host and device. 256 MiB by default, at least 1 MiB.
        threads: The number of threads that read. By default one a core, at most 16.
        strict: Whether checkpoint tensors that the model has no place for are an error. Missing ones always are.
        revision: A branch, tag or commit of a hub id.
        trust_remote_code: Whether to run model code that the checkpoint brings. If it needs some, False is an error.
        attn_implementation: As in ``from_pretrained``: ``"sdpa"``, ``"eager"``, ``"flash_attention_2"``, ...
        device_map: As in ``from_pretrained``, for several devices: ``"auto"``, ``"balanced"``, ``"sequential"``, or
            modules and their devices. What is left for the CPU is copied to an accelerator each time it is used.
        max_memory: Of an automatic ``device_map``: device -> the most bytes of weights there, as in ``{0: "20GiB"}``.
        direct_io: Whether loads to an accelerator read past the page cache. By default where files are not cached;
            scattered parts of tensors, and loads to a CPU, always go through it. Unless it is True, files are read
            ahead into it, up to half of the available memory, while transformers' code is imported.
        verify: Whether what is read is compared with the digests that came with it, such as those of a copy by
            `convert` (``scheme=None``).
        progress: Whether to show a bar (by default, on a terminal), or a function of bytes done and bytes in all.

    Returns:
        An ordinary transformers model in eval mode, whose linear layers and expert stacks hold FP8.
        ``model.load_report`` says what became of what, with bytes and seconds.

    Raises:
        MissingExtraError: transformers is not installed, or the package that downloads hub ids is not.
        CheckpointError: The checkpoint is absent, damaged or of no model that transformers knows.
        RecipeError: An unknown scheme, an ambiguous or unmatched pattern, an option that can't be honoured, or a
            checkpoint that another method has quantized.
        CoverageError: Tensors are missing, unexpected or misshapen, all of them named, before a weight is read.
        DeviceError: The device can't be used, or ``staging_bytes`` is too small.
        WeightError: A weight that is to be quantized is not finite.

    Examples:
        >>> model = octavo.load("Qwen/Qwen3-8B", "fp8_block", ignore=["*.self_attn.*"])
        >>> print(model.load_report)
    """
    from .adapters.transformers.load import load_model
    from .adapters.transformers.options import ModelOptions

    return load_model(
        path,
        Recipe.coerce(scheme, ignore),
        device,
        ModelOptions(dtype, model_class, trust_remote_code, attn_implementation, device_map, max_memory),
        staging_bytes=staging_bytes,
        threads=threads,
        strict=strict,
        revision=revision,
        direct_io=direct_io,
        verify=verify,
        progress=progress,
    )


@public(CheckpointError)
@as_usual()
def plan(
    path: str | os.PathLike[str],
    scheme: str | Recipe | Mapping[str, Any] | None = AUTO,
    device: str | torch.device = "cpu",
    *,
    ignore: Iterable[str] = (),
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    model: bool | None = None,
    format: str = DEFAULT_FORMAT,
    revision: str | None = None,
    strict: bool = True,
    dtype: torch.dtype | str | None = None,
    model_class: type[Any] | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
) -> Plan:
    """Say what `load` or `convert` would do, from headers and shapes alone: no weight is read.

    Args:
        path: A folder, a ``.safetensors`` file, or a hub id, as for `load`. Of a hub id, the weights are downloaded.
        scheme: A scheme, a `Recipe` or its dict form, as for `load`; None plans without quantizing.
        device: The device that the model would go to. It need not exist here.
        ignore: Patterns of weights to leave as they are: names, globs or ``re:regex``.
        staging_bytes: A bound in bytes on memory beyond the result. 256 MiB by default, at least 1 MiB.
        model: True plans loading the transformers model, False converting the checkpoint's own tensors. By default, the
            model where transformers is installed and ``config.json`` names one.
        format: The format of a conversion, ``"compressed-tensors"`` or ``"fp8"``. Plans of a model ignore it.
        revision: A branch, tag or commit of a hub id.
        strict: Of a model: whether tensors that it has no place for are an error.
        dtype: Of a model: the dtype of what is not quantized; by default that of the config.
        model_class: Of a model: its class, where it is not to be the one that the config names.
        trust_remote_code: Of a model: whether the checkpoint may bring code of its own, which is then run.
        attn_implementation: Of a model: as in ``from_pretrained``.
        device_map: Of a model: as for `load`.
        max_memory: As for `load`; none of the devices need exist here.

    Returns:
        The plan: printed, a table of what becomes of which tensors, and why; ``plan.peak_bytes()`` and
        ``plan.final_bytes()`` forecast memory, ``plan.to_dict()`` is for machines.

    Raises:
        OctavoError: Whatever `load` or `convert` would find wrong before reading weights.

    Examples:
        >>> plan = octavo.plan("Qwen/Qwen3-8B", "fp8_block", device="cuda")
        >>> print(plan)
        >>> fits = plan.peak_bytes("cuda") < 24 * 2**30
    """
    from .adapters.transformers import load as adapter
    from .adapters.transformers.options import ModelOptions

    recipe = Recipe.coerce(scheme, ignore)
    if model is not False:
        try:
            adapter.require()
        except MissingExtraError:
            if model:
                raise
            model = False
    checkpoint = Checkpoint.open(path, revision).decoded()
    if not (model or (model is None and checkpoint.config.get("model_type"))):
        from .conversion import formats

        return formats.plan_for(checkpoint, recipe, format, staging_bytes, str(device))[0]
    options = ModelOptions(dtype, model_class, trust_remote_code, attn_implementation, device_map, max_memory)
    return adapter.prepare(checkpoint, recipe, str(device), staging_bytes, options, strict=strict).plan


@public(OutputError)
@as_usual()
def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    scheme: str | Recipe | Mapping[str, Any] | None = AUTO,
    *,
    format: str = DEFAULT_FORMAT,
    ignore: Iterable[str] = (),
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    digests: bool = False,
    verify: bool = False,
    prove: bool = True,
    reader: str | None = None,
    progress: bool | Callable[[int, int], None] | None = None,
) -> Report:
    """Write an FP8 checkpoint, with config, tokenizer files and index, in bounded memory.

    One shard is written for each shard of the source. A conversion that is interrupted leaves ``dst.partial``, and the
    same call goes on where it was, to the same bytes.

    Args:
        src: A folder, a ``.safetensors`` file, or a hub id, as for `load`.
        dst: The folder to make. It must not exist, and appears only when it is complete.
        scheme: A scheme, a `Recipe` or its dict form, as for `load`; None copies, and makes bf16 of what is quantized
            already.
        format: Who is to read it: ``"compressed-tensors"`` (vLLM, and transformers with compressed-tensors; any
            scheme) or ``"fp8"`` (DeepSeek's layout; ``fp8_block`` only).
        ignore: Patterns of weights to leave as they are: names, globs or ``re:regex``.
        staging_bytes: A bound in bytes on memory. 256 MiB by default, at least 1 MiB.
        threads: The number of threads that read. By default one a core, at most 16.
        device: Where to quantize. The bytes are the same everywhere.
        revision: A branch, tag or commit of a hub id.
        digests: Whether a digest of each tensor is recorded, in ``octavo-digests.json``: for `verify` without a source,
            and for loading with ``verify=True``. It takes a tenth more work.
        verify: Whether what is read is compared with the digests that the source has, if `convert` wrote it.
        prove: Whether to ask the code of transformers and of vLLM, where installed, what it would make of the result.
            What it would misread stays unquantized, with the reason in the report.
        reader: Who is to read the result, where it need not be everybody: ``"transformers"`` or ``"vllm"``. It alone is
            asked. Stacks of experts that only one of them takes in FP8 are converted for that one.
        progress: Whether to show a bar (by default, on a terminal), or a function of bytes done and bytes in all.

    Returns:
        What was written, what stayed unquantized and why, with bytes and seconds.

    Raises:
        OutputError: ``dst`` exists, can't be written, or is being written by another process; or the disk is full.
        SourceChangedError: The source is not what it was when an interrupted conversion began.
        RecipeError: An unknown scheme or format, a scheme that the format lacks, an ambiguous or unmatched pattern.
        OctavoError: As for `load`.

    Examples:
        >>> report = octavo.convert("Qwen/Qwen3-8B", "qwen3-8b-fp8")
        >>> print(report)
    """
    from . import readers
    from .conversion.convert import convert_checkpoint

    recipe = Recipe.coerce(scheme, ignore)
    asked = readers.chosen(reader) if prove else None
    return convert_checkpoint(
        src, dst, recipe, format, staging_bytes, threads, device, revision, digests, verify, progress, asked
    )


@public(CheckpointError)
@as_usual()
def verify(
    dst: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    reader: str | None = None,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    threads: int | None = None,
    progress: bool | Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Recompute a converted checkpoint from its source, tensor by tensor, and compare every byte.

    Without a source, compare each tensor with the digest that was recorded when it was written; or ask a reader what
    it makes of the checkpoint, which may be anybody's that is FP8. That needs headers alone.

    Args:
        dst: What `convert` wrote: a folder or a ``.safetensors`` file.
        against: The checkpoint that it was made from: a folder, a file or a hub id. None compares digests, unless a
            reader is named.
        reader: ``"transformers"`` or ``"vllm"``: run its own loading on tensors without data, and see where each weight
            and scale arrives.
        staging_bytes: A bound in bytes on memory. 256 MiB by default, at least 1 MiB.
        threads: The number of threads that read and compare. By default one a core, at most 16.
        progress: Whether to show a bar (by default, on a terminal), or a function of bytes done and bytes in all.

    Returns:
        A report whose ``ok`` says whether every byte is right, and all is read right. Of each tensor that was compared
        it holds the number of bytes that differ (which a digest does not tell) and, where it was quantized, the
        signal-to-noise ratio against the source in dB; of a reader, what it would misread, miss or refuse.

    Raises:
        CheckpointError: The two don't hold the same tensors, or ``dst`` is in no format that octavo writes; or a file
            is damaged, or ends early; or there are no digests, or not of these tensors.
        RecipeError: No such reader.
        MissingExtraError: The reader is not installed.
        DeviceError: ``staging_bytes`` is too small.

    Examples:
        >>> report = octavo.convert("Qwen/Qwen3-8B", "qwen3-8b-fp8")
        >>> assert octavo.verify("qwen3-8b-fp8", against="Qwen/Qwen3-8B").ok
    """
    from . import readers
    from .conversion.proof import judge_written
    from .conversion.verify import verify_checkpoint, verify_digests

    judgement = None if reader is None else judge_written(Checkpoint.open(dst), readers.installed(reader))
    if judgement is not None and against is None:
        return VerifyReport((), judgement=judgement)
    if against is None:
        return verify_digests(dst, staging_bytes, threads, progress)
    return replace(verify_checkpoint(dst, against, staging_bytes, threads, progress), judgement=judgement)


@public(CheckpointError)
@as_usual()
def stream(
    path: str | os.PathLike[str],
    scheme: str | Recipe | Mapping[str, Any] | None = AUTO,
    device: str | torch.device = "cpu",
    *,
    format: str = DEFAULT_FORMAT,
    ignore: Iterable[str] = (),
    staging_bytes: int = DEFAULT_STAGING_BYTES,
    threads: int | None = None,
    revision: str | None = None,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the ``(name, tensor)`` pairs of the FP8 checkpoint that `convert` would write if it asked no reader.

    Tensors come in the order of the files, each quantized one followed by its scale; each is the caller's to keep.
    Reading runs ahead by at most the staging budget. Closing the iterator early ends its threads.

    Args:
        path: A folder, a ``.safetensors`` file, or a hub id, as for `load`.
        scheme: A scheme, a `Recipe` or its dict form, as for `load`; None hands out the weights unquantized.
        device: Where to quantize, and where the tensors are handed out.
        format: How scales are named and laid out: ``"compressed-tensors"`` (``X.weight_scale``) or ``"fp8"``
            (``X.weight_scale_inv``, ``fp8_block`` only).
        ignore: Patterns of weights to leave as they are: names, globs or ``re:regex``.
        staging_bytes: A bound in bytes on memory, which a single tensor may exceed. 256 MiB by default, at least 1 MiB.
        threads: The number of threads that read. By default one a core, at most 16.
        revision: A branch, tag or commit of a hub id.
        verify: Whether what is read is compared with the digests that `convert` recorded of it. None is handed out of
            a tensor that is not what was written.
        progress: A function of the bytes done and the bytes in all, both of the source.

    Raises:
        OctavoError: At the call, whatever headers can tell, as for `convert`; and that the checkpoint holds codes that
            octavo can't decode, of which `convert` writes a copy. On the way, what only reading shows: a
            `WeightError` where a weight is not finite, a `SourceChangedError` where a file changed.

    Examples:
        >>> for name, tensor in octavo.stream("Qwen/Qwen3-8B", "fp8_channel"):
        ...     print(name, tensor.dtype, tuple(tensor.shape))
    """
    from .conversion import formats
    from .conversion.iterate import iterate

    recipe, where = Recipe.coerce(scheme, ignore), str(usable_device(device))
    checkpoint = Checkpoint.open(path, revision).decoded()
    made, layout = formats.plan_for(checkpoint, recipe, format, staging_bytes, where)
    check_no_codes(checkpoint)
    checks = Checks(checkpoint) if verify else None
    told = progress and of_user(progress)
    return iterate(checkpoint, made, layout, threads=threads, progress=told, checks=checks)


def __getattr__(name: str) -> Any:
    if name not in ("layerwise", "update"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api_models

    return getattr(api_models, name)


__all__ = ["convert", "layerwise", "load", "plan", "stream", "update", "verify"]
