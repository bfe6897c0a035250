"""Which share of a model's matrices becomes FP8, loaded and converted, for full-size shapes of many families?

    python benchmarks/shares.py [--families Qwen3-8B ...]

No weight exists: each model is built on meta, its tensors are named as they are published, and a file of headers alone
is planned: for `octavo.load`; for `octavo.convert`, where transformers' own code is asked what it would read; and for
``convert(reader="vllm")``, where known names decide if vLLM is not installed beside it. Bytes are those of tensors with
two and more dimensions, in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
from _families import FAMILIES, Family
from common import ChildError, run_fresh, say

WAYS = ("loaded", "converted", "converted_for_vllm")

CHILD = """
import shares
from _families import FAMILIES
result(**shares.measure(FAMILIES[sys.argv[1]]))
"""


def write_headers(family: Family, folder: Path) -> int:
    """A checkpoint without weights, under published names; returns the bytes of its matrices."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    config = getattr(transformers, family.config)(**family.sizes)
    config.architectures, config.dtype = [family.model], "bfloat16"
    with torch.device("meta"):
        model = getattr(transformers, family.model)(config)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    tensors = revert_weight_conversion(model, state)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config.save_pretrained(folder)
    return sum(2 * tensor.numel() for tensor in tensors.values() if tensor.dim() > 1)


def measure(family: Family) -> dict[str, Any]:
    """Bytes of matrices, and what becomes of them."""
    import octavo
    from octavo.checkpoint.checkpoint import Checkpoint
    from octavo.choices import DEFAULT_FORMAT, DEFAULT_SCHEME, DEFAULT_STAGING_BYTES
    from octavo.conversion import formats
    from octavo.conversion.proof import prove
    from octavo.planning.recipe import Recipe
    from octavo.readers import chosen
    from octavo.streaming.meter import Stages

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        matrices = write_headers(family, folder)
        loaded = octavo.plan(folder, model=True)
        checkpoint, recipe = Checkpoint.open(folder), Recipe(DEFAULT_SCHEME)

        def plan_with(veto: Any, cuts: Any) -> Any:
            return formats.plan_for(checkpoint, recipe, DEFAULT_FORMAT, DEFAULT_STAGING_BYTES, "cpu", veto, cuts)[0]

        proofs = {
            way: prove(checkpoint, plan_with, formats.get(DEFAULT_FORMAT), readers, Stages())
            for way, readers in (("converted", chosen(None)), ("converted_for_vllm", chosen("vllm")))
        }
    return {
        "matrix_bytes": matrices,
        "loaded": _shares(loaded.placements),
        **{way: {**_shares(proof.plan.placements), "notes": list(proof.notes)} for way, proof in proofs.items()},
    }


def _shares(placements: Iterable[Any]) -> dict[str, Any]:
    quantized, kept = 0, Counter[str]()
    for placement in placements:
        nbytes = 2 * math.prod(placement.shape)
        if placement.scheme:
            quantized += nbytes
        elif len(placement.shape) > 1:
            kept[placement.reason] += nbytes
    return {"fp8_source_bytes": quantized, "kept_bytes": dict(kept.most_common())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--no-save", action="store_true", help="print the figures only")
    arguments = parser.parse_args()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        measured = dict(zip(arguments.families, pool.map(_measured, arguments.families), strict=True))
    found = {name: values for name, values in measured.items() if values}
    common.save("shares", Path(tempfile.gettempdir()), {"families": found}, write=not arguments.no_save)


def _measured(name: str) -> dict[str, Any]:
    """The figures of a family, told; nothing if it failed."""
    try:
        found = run_fresh(CHILD, name, timeout_s=900)
    except ChildError as error:
        say(f"{name}: {error}")
        return {}
    del found["process"]
    of = found["matrix_bytes"]
    say(f"{name}: {of / 1e9:.1f} GB, " + ", ".join(f"{found[way]['fp8_source_bytes'] / of:.1%}" for way in WAYS))
    return found


if __name__ == "__main__":
    main()
