"""Random checkpoints, nearly all of bf16, as the hub lays them out: config.json, shards, index. No tokenizer.

    python benchmarks/make_checkpoint.py llama3-8b DIR --layers 4

Weights are normal with standard deviation 0.02, as models are initialised; norms are 1 and biases 0. One block of
random numbers is written over and over, from another offset for each run of it, several shards at a time, so the disk
(or, in memory, the machine) sets the speed and memory stays small. The bytes are the same wherever and however often
they are made. Run without arguments, it lists the shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

Shapes = Iterator[tuple[str, tuple[int, ...]]]
Shard = list[tuple[str, tuple[int, ...]]]
_BLOCK_ELEMENTS = (16 << 20) - 3  # odd, so that rows of a matrix don't repeat
_WRITE_ELEMENTS = 1 << 19  # larger writes can be several times slower: page cache in huge folios, in some guests
_STD = 0.02


def _config(architecture: str, model_type: str, **options: Any) -> dict[str, Any]:
    usual = {"torch_dtype": "bfloat16", "tie_word_embeddings": False, "rms_norm_eps": 1e-5}
    return {"architectures": [architecture], "model_type": model_type, **usual, **options}


def _decoder(c: dict[str, Any], mlp: Callable[[str], Shapes], *, bias: str = "", qk_norm: bool = False) -> Shapes:
    """A decoder in the usual names; ``bias`` says which of q, k, v and o have one."""
    hidden, head = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for name, shape in (("q", (q, hidden)), ("k", (kv, hidden)), ("v", (kv, hidden)), ("o", (hidden, q))):
            yield f"{at}self_attn.{name}_proj.weight", shape
            if name in bias:
                yield f"{at}self_attn.{name}_proj.bias", shape[:1]
        if qk_norm:
            yield f"{at}self_attn.q_norm.weight", (head,)
            yield f"{at}self_attn.k_norm.weight", (head,)
        yield from mlp(at)
        yield f"{at}input_layernorm.weight", (hidden,)
        yield f"{at}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)


def _gated(at: str, hidden: int, inner: int) -> Shapes:
    yield f"{at}.gate_proj.weight", (inner, hidden)
    yield f"{at}.up_proj.weight", (inner, hidden)
    yield f"{at}.down_proj.weight", (hidden, inner)


def llama(layers: int, vocab: int = 128256, inner: int = 14336) -> tuple[dict[str, Any], Shapes]:
    c = _config("LlamaForCausalLM", "llama", vocab_size=vocab, hidden_size=4096, intermediate_size=inner)
    c.update(num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_theta=5e5)
    c.update(max_position_embeddings=8192)
    return c, _decoder(c, lambda at: _gated(f"{at}mlp", 4096, inner))


def granite_stack(layers: int, experts: int = 32) -> tuple[dict[str, Any], Shapes]:
    """Experts stored as stacks [experts, out, in]: 67 MB of gate and up an expert."""
    c = _config("GraniteMoeForCausalLM", "granitemoe", vocab_size=4096, hidden_size=4096, intermediate_size=4096)
    c.update(num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    c.update(num_local_experts=experts, num_experts_per_tok=4)

    def mlp(at: str) -> Shapes:
        yield f"{at}block_sparse_moe.input_linear.weight", (experts, 2 * 4096, 4096)
        yield f"{at}block_sparse_moe.output_linear.weight", (experts, 4096, 4096)
        yield f"{at}block_sparse_moe.router.layer.weight", (experts, 4096)

    return c, _decoder(c, mlp)


def gpt_oss_stack(layers: int, experts: int = 64) -> tuple[dict[str, Any], Shapes]:
    """Experts stored as stacks [experts, in, out], gate and up interleaved: 33 MB of them an expert."""
    c = _config("GptOssForCausalLM", "gpt_oss", vocab_size=4096, hidden_size=2880, intermediate_size=2880)
    c.update(num_hidden_layers=layers, num_attention_heads=64, num_key_value_heads=8, head_dim=64)
    c.update(num_local_experts=experts, num_experts_per_tok=4)

    def mlp(at: str) -> Shapes:
        for name, inner, outer in (("gate_up", 2880, 5760), ("down", 2880, 2880)):
            yield f"{at}mlp.experts.{name}_proj", (experts, inner, outer)
            yield f"{at}mlp.experts.{name}_proj_bias", (experts, outer)
        yield f"{at}mlp.router.weight", (experts, 2880)
        yield f"{at}mlp.router.bias", (experts,)
        yield f"{at}self_attn.sinks", (64,)

    return c, _decoder(c, mlp, bias="qkvo")


def gpt_oss_mxfp4(layers: int, experts: int) -> tuple[dict[str, Any], Shapes]:
    """The same as it is published: experts in MXFP4, 32 columns to an exponent, two numbers to a byte."""
    config, shapes = gpt_oss_stack(layers, experts)
    config["quantization_config"] = {"quant_method": "mxfp4"}

    def packed() -> Shapes:
        for name, shape in shapes:
            if not name.endswith(("gate_up_proj", "down_proj")):
                yield name, shape
                continue
            of, inner, outer = shape
            yield f"{name}_blocks", (of, outer, inner // 32, 16)
            yield f"{name}_scales", (of, outer, inner // 32)

    return config, packed()


def qwen_moe(layers: int, experts: int, inner: int, *, v3: bool) -> tuple[dict[str, Any], Shapes]:
    kind = "Qwen3Moe" if v3 else "Qwen2Moe"
    c = _config(f"{kind}ForCausalLM", "qwen3_moe" if v3 else "qwen2_moe", vocab_size=151936, hidden_size=2048)
    c.update(num_hidden_layers=layers, num_attention_heads=32 if v3 else 16, num_key_value_heads=4 if v3 else 16)
    c.update(head_dim=128, num_experts=experts, moe_intermediate_size=inner, num_experts_per_tok=8 if v3 else 4)
    c.update(intermediate_size=6144 if v3 else 5632, rms_norm_eps=1e-6, rope_theta=1000000.0, norm_topk_prob=v3)
    if not v3:
        c.update(shared_expert_intermediate_size=5632)

    def mlp(at: str) -> Shapes:
        yield f"{at}mlp.gate.weight", (experts, 2048)
        for expert in range(experts):
            yield from _gated(f"{at}mlp.experts.{expert}", 2048, inner)
        if not v3:
            yield from _gated(f"{at}mlp.shared_expert", 2048, 5632)
            yield f"{at}mlp.shared_expert_gate.weight", (1, 2048)

    return c, _decoder(c, mlp, bias="" if v3 else "qkv", qk_norm=v3)


def opt(layers: int) -> tuple[dict[str, Any], Shapes]:
    c = {"architectures": ["OPTForCausalLM"], "model_type": "opt", "torch_dtype": "bfloat16", "vocab_size": 50272}
    c.update(hidden_size=768, word_embed_proj_dim=768, ffn_dim=3072, num_hidden_layers=layers, num_attention_heads=12)
    c.update(max_position_embeddings=2048, do_layer_norm_before=True, activation_function="relu")

    def shapes() -> Shapes:
        yield "model.decoder.embed_tokens.weight", (50272, 768)
        yield "model.decoder.embed_positions.weight", (2050, 768)
        linears = [(f"self_attn.{name}_proj", 768, 768) for name in ("q", "k", "v", "out")]
        for layer in range(layers):
            at = f"model.decoder.layers.{layer}."
            for name, outer, inner in (*linears, ("fc1", 3072, 768), ("fc2", 768, 3072)):
                yield f"{at}{name}.weight", (outer, inner)
                yield f"{at}{name}.bias", (outer,)
            for name in ("self_attn_layer_norm", "final_layer_norm"):
                yield f"{at}{name}.weight", (768,)
                yield f"{at}{name}.bias", (768,)
        yield from ((f"model.decoder.final_layer_norm.{leaf}", (768,)) for leaf in ("weight", "bias"))

    return c, shapes()


#: name -> (layers by default, what makes its config and shapes from a number of layers)
MODELS: dict[str, tuple[int, Callable[[int], tuple[dict[str, Any], Shapes]]]] = {
    "llama3-8b": (32, llama),
    "big-tensor": (1, lambda layers: llama(layers, vocab=4096, inner=131072)),  # three matrices of 1.07 GB
    "big-stack": (1, granite_stack),  # 2.15 GB of gate and up
    "big-stack-transposed": (1, gpt_oss_stack),  # 2.12 GB
    # more than 2^31 elements and 2^32 bytes in one tensor: 5.37 and 5.31 GB
    "huge-stack": (1, lambda layers: granite_stack(layers, experts=80)),
    "huge-stack-transposed": (1, lambda layers: gpt_oss_stack(layers, experts=160)),
    "llama3-8b-bare": (4, lambda layers: llama(layers, vocab=4096)),  # hardly any embeddings
    "mxfp4-stack": (1, lambda layers: gpt_oss_mxfp4(layers, experts=160)),  # 1.41 GB of gate and up
    "qwen1.5-moe-a2.7b": (24, lambda layers: qwen_moe(layers, 60, 1408, v3=False)),
    "qwen3-30b-a3b": (48, lambda layers: qwen_moe(layers, 128, 768, v3=True)),
    "opt-125m": (12, opt),
}


# -- writing ----------------------------------------------------------------------------------------------------------


def _random_block() -> np.ndarray:
    """bf16 normals as uint16, the block twice over, so that any offset can be read from."""
    bits = (np.random.default_rng(0).standard_normal(_BLOCK_ELEMENTS, dtype=np.float32) * _STD).view(np.uint32)
    block = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # round to nearest, ties to even
    return np.concatenate([block, block])


def _stored(name: str) -> tuple[str, int]:
    """The dtype of a tensor, and bytes of an element."""
    return ("U8", 1) if name.endswith(("_blocks", "_scales")) else ("BF16", 2)


def _nbytes(name: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _stored(name)[1]


def _bytes(name: str, count: int, offsets: np.random.Generator) -> Iterator[np.ndarray]:
    """Numbers of four bits, all as likely; exponents that differ by six at most."""
    low, high = (118, 125) if name.endswith("_scales") else (0, 256)
    block = offsets.integers(low, high, size=min(count, _BLOCK_ELEMENTS), dtype=np.uint8)
    for start in range(0, count, block.size):
        yield block[: count - start]


def _values(name: str, count: int, block: np.ndarray, offsets: np.random.Generator) -> Iterator[np.ndarray]:
    if _stored(name)[0] == "U8":
        yield from _bytes(name, count, offsets)
    elif name.endswith("bias"):
        yield np.zeros(count, np.uint16)
    elif "norm" in name:
        yield np.full(count, 0x3F80, np.uint16)  # 1.0
    else:
        while count:
            run, offset = min(count, _BLOCK_ELEMENTS), int(offsets.integers(_BLOCK_ELEMENTS))
            yield block[offset : offset + run]
            count -= run


def _cut(shapes: Shapes, shard_bytes: int) -> list[Shard]:
    """Tensors to shards, of about equal size; a tensor is never cut."""
    tensors = list(shapes)
    total = sum(_nbytes(*tensor) for tensor in tensors)
    share = total / math.ceil(total / shard_bytes)
    shards: list[Shard] = []
    done = 0
    for name, shape in tensors:
        if done >= share * len(shards):
            shards.append([])
        shards[-1].append((name, shape))
        done += _nbytes(name, shape)
    return shards


def _write(path: Path, shard: Shard, block: np.ndarray | None, offsets: np.random.Generator) -> None:
    """Without a block of random numbers, the file has its header and its size, and no data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in shard:
        begin, end = end, end + _nbytes(tensor, shape)
        header[tensor] = {"dtype": _stored(tensor)[0], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if block is None:
            file.truncate(file.tell() + end)
            return
        for tensor, shape in shard:
            for values in _values(tensor, math.prod(shape), block, offsets):
                for start in range(0, values.size, _WRITE_ELEMENTS):
                    file.write(values[start : start + _WRITE_ELEMENTS].data)


def make(
    model: str,
    folder: Path,
    layers: int | None = None,
    shard_gb: float = 2.0,
    threads: int | None = None,
    *,
    sparse: bool = False,
) -> dict[str, Any]:
    """Write the checkpoint; a folder that has its config is taken to be complete.

    Args:
        sparse: whether the files are to hold headers and no data: zeros when read, and next to nothing on a disk.
    """
    default_layers, build = MODELS[model]
    layers = layers or default_layers
    config, shapes = build(layers)
    shards = _cut(shapes, int(shard_gb * 1e9))
    facts = {
        "model": model,
        "layers": layers,
        "tensors": sum(map(len, shards)),
        "bytes": sum(_nbytes(*tensor) for shard in shards for tensor in shard),
        "shards": len(shards),
    }
    if (folder / "config.json").is_file():
        return facts
    folder.mkdir(parents=True, exist_ok=True)
    if not sparse and (free := shutil.disk_usage(folder).free) < facts["bytes"]:
        raise OSError(f"{folder}: {model} needs {facts['bytes'] / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    of = len(shards)
    names = [f"model-{n:05d}-of-{of:05d}.safetensors" for n in range(1, of + 1)] if of > 1 else ["model.safetensors"]
    block = None if sparse else _random_block()
    with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(_write, folder / name, shard, block, np.random.default_rng((1, number)))
            for number, (name, shard) in enumerate(zip(names, shards, strict=True))
        ]
        for job in jobs:
            job.result()
    if of > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard}
        index = {"metadata": {"total_size": facts["bytes"]}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # last: its presence says complete
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=MODELS)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--layers", type=int, help="instead of the model's own number")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="largest shard, about, in 1e9 bytes (%(default)s)")
    parser.add_argument("--threads", type=int, help="shards written at a time (one a core, at most 16)")
    parser.add_argument("--sparse", action="store_true", help="headers and sizes alone, to plan with")
    args = parser.parse_args()
    if args.folder is None:
        for model, (layers, build) in MODELS.items():
            sizes = [_nbytes(*tensor) for tensor in build(layers)[1]]
            print(f"{model:22} {layers:3} layers {len(sizes):6,} tensors {sum(sizes) / 1e9:6.2f} GB", file=sys.stderr)
        print(json.dumps(sorted(MODELS)))
        return
    started = time.perf_counter()
    facts = make(args.model, args.folder, args.layers, args.shard_gb, args.threads, sparse=args.sparse)
    print(json.dumps({**facts, "seconds": round(time.perf_counter() - started, 2)}))


if __name__ == "__main__":
    main()
