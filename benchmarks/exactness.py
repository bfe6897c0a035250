"""How many weights of sources that are quantized already does FP8 keep, under octavo's scales and under the usual ones?

    python benchmarks/exactness.py [--checkpoint FOLDER]

Sources are made here, by the rules of their formats: MXFP4 in groups of 32, NVFP4 in groups of 16, FP8 in blocks of
128x128 whose scales are powers of two. Of random matrices of gpt-oss's width: normally distributed, with rows and
columns of very different sizes, and with heavy tails; and of some of a checkpoint's. A weight counts as kept if it is
the same number of bf16 afterwards. ``usual`` are the scales that a scheme has for bf16 sources. ``passing`` is what
becomes of sources whose groups are those of the scheme.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import common
import torch
from common import say
from torch import Tensor

import octavo
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.checkpoint.codings import Decoding
from octavo.numerics import schemes
from octavo.numerics.decoding import decode
from octavo.numerics.lossless import count_exact, keeps, lossless_scale, unit_of

SCHEMES = ("fp8_channel", "fp8_block", "fp8_tensor")
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_BETWEEN = (_E2M1[1:] + _E2M1[:-1]) / 2
_ROWS, _COLS = 1024, 2880


class Source(NamedTuple):
    """A weight as a format stores it, decoded; and what its global scale makes of the target's."""

    weight: Tensor
    decoding: Decoding
    unit: Tensor | None


def mxfp4(weight: Tensor) -> Source:
    """By OCP Microscaling Formats v1.0, section 6.3."""
    decoding = Decoding("e2m1", 1, 32, powers=True)
    groups = weight.view(len(weight), -1, 32)
    exponents = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2.0**-100))) - 2
    codes = _e2m1(groups / torch.exp2(exponents).unsqueeze(-1), weight.shape)
    return Source(decode(tuple(weight.shape), codes, (exponents + 127).to(torch.uint8), decoding), decoding, None)


def nvfp4(weight: Tensor) -> Source:
    decoding = Decoding("e2m1", 1, 16)
    groups, whole = weight.view(len(weight), -1, 16), (weight.abs().amax() / (6 * 448)).view(1, 1)
    scales = (groups.abs().amax(-1) / 6 / whole).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    codes = _e2m1(groups / (scales.float() * whole).unsqueeze(-1), weight.shape)
    found = decode(tuple(weight.shape), codes, scales, decoding, global_scale=whole)
    return Source(found, decoding, unit_of(decoding, whole))


def fp8_blocks(weight: Tensor) -> Source:
    """FP8 in blocks, with scales rounded up to powers of two (ue8m0)."""
    scheme, decoding = schemes.get("fp8_block"), Decoding("float8", 128, 128, powers=True)
    scale = lossless_scale(schemes.group_amax(weight, scheme))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    schemes.quantize_into(codes, weight, scale, scheme)
    return Source(decode(tuple(weight.shape), codes, scale, decoding), decoding, None)


def _e2m1(groups: Tensor, shape: torch.Size) -> Tensor:
    """Two numbers a byte, each the nearest."""
    flat = groups.reshape(shape)
    codes = torch.bucketize(flat.abs(), _BETWEEN).to(torch.uint8) | (flat < 0).to(torch.uint8) << 3
    return codes[:, 0::2] | codes[:, 1::2] << 4


FORMATS: dict[str, Callable[[Tensor], Source]] = {"MXFP4": mxfp4, "NVFP4": nvfp4, "FP8 blocks, ue8m0": fp8_blocks}


def random_matrices() -> Iterator[tuple[str, list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(_ROWS, _COLS, generator=generator) * 0.02
    sizes = (torch.exp2(torch.randn(side, generator=generator)) for side in (_ROWS, _COLS))
    rows, cols = sizes
    tails = torch.randn(4, _ROWS, _COLS, generator=generator)
    yield "normal", [normal]
    yield "rows and columns of different sizes", [normal * rows[:, None] * cols]
    yield "heavy tails (Student's t, 3 degrees of freedom)", [normal / (tails[:3].square().mean(0).sqrt() + 1e-6)]


def matrices_of(folder: Path) -> list[Tensor]:
    """Each ninth of a checkpoint's matrices whose columns groups of 32 divide, without embeddings."""
    from safetensors.torch import load_file

    checkpoint = Checkpoint.open(folder)
    tensors = {name: tensor for shard in checkpoint.shards for name, tensor in load_file(shard.path).items()}
    found = [
        tensor
        for name, tensor in sorted(tensors.items())
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "embed" not in name and "head" not in name
    ]
    return [tensor.float() for tensor in found[::9]]


def measure(matrices: list[Tensor], make: Callable[[Tensor], Source], scheme_name: str) -> dict[str, Any]:
    """The share of weights that are kept, and the error of all, in dB."""
    scheme = schemes.get(scheme_name)
    found: dict[str, Any] = {}
    sources = [make(matrix) for matrix in matrices]
    assert all(keeps(source.decoding, scheme) for source in sources)
    for way in ("octavo", "usual"):
        kept, signal, noise = 0, 0.0, 0.0
        for weight, _, unit in sources:
            amax = schemes.group_amax(weight, scheme)
            scale = lossless_scale(amax, unit) if way == "octavo" else schemes.scale_from_amax(amax, scheme)
            codes = torch.empty(weight.shape, dtype=scheme.dtype)
            schemes.quantize_into(codes, weight, scale, scheme)
            kept += count_exact(weight, codes, scale, scheme.groups)
            stored = schemes.to_stored(scale, scheme).reshape(scheme.scale_shape(weight.shape))
            error = schemes.dequantize(codes, stored, scheme) - weight
            signal += weight.double().square().sum().item()
            noise += error.double().square().sum().item()
        decibels = 10 * torch.tensor(signal / noise).log10().item() if noise else None
        found[way] = {"kept_share": kept / sum(s.weight.numel() for s in sources), "error_db": decibels}
    return found


def measure_passing(matrices: list[Tensor], scheme_name: str) -> dict[str, Any]:
    """The share of bytes, of numbers and of scales, that a conversion to the groups which a source has leaves alone.

    Scales are amax / 448, as DeepSeek's; octavo's own would be others.
    """
    from safetensors.torch import load_file, save_file

    scheme, stored = schemes.get(scheme_name), {}
    for number, weight in enumerate(matrices):
        name, scale = f"model.layers.{number}.mlp.up_proj.weight", schemes.group_amax(weight, scheme) / 448
        stored[name] = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        schemes.quantize_into(stored[name], weight, scale, scheme)
        stored[f"{name}_scale"] = scale
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "source", Path(folder) / "out"
        source.mkdir()
        save_file(stored, source / "model.safetensors")
        if scheme_name == "fp8_block":  # of matrices with few rows, shapes alone don't tell the size of blocks
            declared = {"quant_method": "fp8", "weight_block_size": list(scheme.groups)}
            (source / "config.json").write_text(json.dumps({"quantization_config": declared}))
        octavo.convert(source, out, scheme_name, progress=False, prove=False)
        made = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    equal = total = 0
    for name, tensor in stored.items():
        mine, theirs = (each.contiguous().view(torch.uint8).flatten() for each in (made[name], tensor))
        equal, total = equal + int((mine == theirs).sum()), total + theirs.numel()
    return {"equal_bytes_share": equal / total, "bytes": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="an unquantized checkpoint, whose matrices are taken, too")
    parser.add_argument("--no-save", action="store_true", help="print the figures only")
    arguments = parser.parse_args()
    data = dict(random_matrices())
    if arguments.checkpoint is not None:
        data[arguments.checkpoint.name] = matrices_of(arguments.checkpoint)
    found: dict[str, Any] = {}
    for name, matrices in data.items():
        for kind, make in FORMATS.items():
            for scheme in SCHEMES if kind != "FP8 blocks, ue8m0" else ("fp8_channel", "fp8_tensor"):
                values = measure(matrices, make, scheme)
                found.setdefault(name, {}).setdefault(kind, {})[scheme] = values
                say(f"{name}, {kind} -> {scheme}: " + "; ".join(f"{w}: {_told(v)}" for w, v in values.items()))
    passing = {scheme: measure_passing([m for each in data.values() for m in each], scheme) for scheme in SCHEMES}
    for scheme, values in passing.items():
        say(f"FP8 in the groups of {scheme} -> {scheme}: {values['equal_bytes_share']:.2%} of the bytes are equal")
    common.save(
        "exactness", Path(tempfile.gettempdir()), {"data": found, "passing": passing}, write=not arguments.no_save
    )


def _told(values: dict[str, Any]) -> str:
    error = "no error" if values["error_db"] is None else f"{values['error_db']:.2f} dB"
    return f"{values['kept_share']:.2%} kept, {error}"


if __name__ == "__main__":
    main()
