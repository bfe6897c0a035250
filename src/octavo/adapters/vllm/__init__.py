"""octavo inside vLLM: a bf16 checkpoint that looks like an FP8 one.

vLLM is given the config of a compressed-tensors FP8 checkpoint and, when it loads, a stream that has ``X.weight`` in
FP8 followed by ``X.weight_scale``, made from the bf16 checkpoint on the way. Fusing, sharding and kernels are those
that vLLM has for FP8 checkpoints on disk. Scales are taken over whole tensors of the checkpoint, so the bytes are those
that `octavo.convert` writes, whatever the degree of parallelism.

    plugin     what every process of vLLM is told
    config     the quantization config that vLLM is given
    fitting    layers that can't be made in FP8
    loader     ``--load-format octavo``
    drafts     models beside the target
    options    what its users may say
    telling    errors, in the log
    reloading  what happens when weights are loaded again; `arrivals`: what has come for each layer
    repacking  experts that vLLM packs for a CPU the first time only
    cpu_kernels  for processors for which vLLM has none
    reader     what vLLM would make of a checkpoint in FP8; `asking` and `watching`: in a process of its own
    planning   what it would make of one in octavo's FP8; `forecasting` and `processing`: in a process of its own
    versions   what differs between vLLM's versions

`register` is the entry point in vLLM's plugin group ``vllm.general_plugins``; it is called in every process of vLLM.
"""

from __future__ import annotations


def register() -> None:
    """Make ``--load-format octavo`` and ``--quantization octavo_...`` known to vLLM. May be called repeatedly."""
    try:
        import vllm.platforms  # noqa: F401
    except ImportError:
        return
    from . import versions

    if not versions.is_supported():
        return  # --load-format octavo is then unknown to vLLM, which says so
    from . import plugin

    plugin.register()


__all__ = ["register"]
