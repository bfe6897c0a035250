"""octavo inside SGLang: a bf16 checkpoint that looks like an FP8 one.

SGLang is given the config of an FP8 checkpoint where it reads a checkpoint's own, and decides all as for that. When it
loads, its model's memory is filled from the bf16 checkpoint, quantized on the way. Fusing, sharding and kernels are
those that SGLang has for FP8 checkpoints on disk, and the bytes are those that `octavo.convert` writes.

    plugin     what every process of SGLang is told: names, and hooks
    asking     which models octavo quantizes, and how
    config     which layers stay unquantized
    loader     ``--load-format octavo``
    computed   what loaders compute of weights, once all are there
    options    what its users may say
    offered    which schemes it is given
    versions   what differs between SGLang's versions

`register` is the entry point in SGLang's plugin group ``sglang.srt.plugins``; it is called in every process of SGLang.
"""

from __future__ import annotations


def register() -> None:
    """Make ``--load-format octavo`` and ``--quantization octavo_...`` known to SGLang. May be called repeatedly."""
    from . import plugin

    plugin.register()


__all__ = ["register"]
