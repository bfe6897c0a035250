"""What an engine's loader would make of a checkpoint in FP8: what it misreads, and which layers wait for a scale."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from helpers.vllm_toys import Toy
from octavo.adapters.engine.judging import Case, Verdict
from octavo.checkpoint.header import TensorInfo

WEIGHTS = {"gate_proj": (256, 256), "up_proj": (256, 256), "down_proj": (256, 256)}
ALL = tuple(WEIGHTS)


def judge(model: Toy, quantized: Collection[str] = ALL, others: Collection[str] = ("norm",), **case: Any) -> Verdict:
    tensors, scales = {}, {}
    for layer, shape in WEIGHTS.items():
        name = f"{layer}.weight"
        tensors[name] = TensorInfo(name, "F8_E4M3" if layer in quantized else "BF16", shape, 0, 0, 0)
        if layer in quantized:
            scale = scales[name] = f"{name}_scale"
            tensors[scale] = TensorInfo(scale, "F32", (shape[0], 1), 0, 0, 0)
    tensors.update({name: TensorInfo(name, "BF16", (256,), 0, 0, 0) for name in others})
    return Case(model, model.load_weights, tensors, scales, **case).judge()


def test_what_arrives_with_its_scale_is_read_right() -> None:
    assert judge(Toy()) == Verdict()
    assert judge(Toy(quantized=()), quantized=()) == Verdict()


def test_a_layer_that_the_engine_leaves_unquantized_misreads_its_weight() -> None:
    verdict = judge(Toy(quantized=("gate_up_proj",)))
    assert verdict == Verdict(misread={"down_proj.weight": "it keeps this layer unquantized (Layer)"})


class Late(Toy):
    """Reads all before it loads anything, and calls what it does not find by its own name."""

    def load_weights(self, weights: Any) -> None:
        try:
            super().load_weights(iter(list(weights)))
        except KeyError:
            raise KeyError("inner.down.weight_scale") from None


def test_what_a_loader_calls_by_another_name_is_found() -> None:
    verdict = judge(Late(quantized=("gate_up_proj",)))
    assert verdict == Verdict(misread={"down_proj.weight": "it keeps this layer unquantized (Layer)"})


@pytest.mark.parametrize(
    ("down", "why"),
    [("no scales", "it passes over the scale"), ("shifted", "it does not cut its scale")],
)
def test_a_loader_that_has_no_use_for_a_scale_misreads_the_weight(down: str, why: str) -> None:
    misread = judge(Toy(down=down)).misread
    assert list(misread) == ["down_proj.weight"]
    assert misread["down_proj.weight"].startswith(why)


def test_a_layer_in_fp8_waits_for_the_scale_of_a_kept_weight() -> None:
    verdict = judge(Toy(), ("gate_proj", "up_proj"))
    assert verdict == Verdict(waiting={"down_proj": "down_proj.weight comes without a scale"})


def test_what_is_fused_with_a_kept_weight_is_misread_with_it() -> None:
    verdict = judge(Toy(), ("up_proj", "down_proj"))
    assert verdict.waiting == {"gate_up_proj": "gate_proj.weight comes without a scale"}
    assert verdict.misread == {
        "up_proj.weight": "it fuses it with others, of which gate_proj.weight comes without a scale"
    }


def test_what_fills_a_layer_with_gaps_is_misread() -> None:
    """As where an engine takes a matrix for two that are fused."""
    assert judge(Toy(down="halved")).misread == {
        "down_proj.weight": "it leaves a part of down_proj.weight empty, or fills it twice"
    }


def test_layers_that_cant_be_built_in_fp8_are_told_apart() -> None:
    model = Toy(quantized=("gate_up_proj",))
    assert judge(model, plain={"down_proj": "sides"}).misread == {
        "down_proj.weight": "it can't build the layer in FP8: sides"
    }
    verdict = judge(model, unbuilt={"down_proj": "no kernel"})
    assert (list(verdict.refused), verdict.misread) == (["down_proj.weight"], {})
    assert judge(model, ("gate_proj", "up_proj"), plain={"down_proj": "sides"}).waiting.keys() == {"down_proj"}


def test_what_the_loader_passes_over_is_named_and_so_is_what_stays_empty() -> None:
    assert judge(Toy(), others=()).missing == ("norm",)
    assert judge(Toy(), others=(), exempt=("norm",)) == Verdict()
    verdict = judge(Toy(down="passed over"))
    assert (verdict.unread, verdict.empty) == (("down_proj.weight",), ("down_proj",))
    # names that a loader does not know are not right because the layer can't be built in FP8
    model = Toy(down="passed over", quantized=("gate_up_proj",))
    assert judge(model, unbuilt={"down_proj": "no kernel"}).empty == ("down_proj",)


def test_a_tensor_that_the_loader_does_not_take_at_all_ends_the_question() -> None:
    verdict = judge(Toy(), others=("norm", "other"))
    assert "does not take the tensor other" in verdict.refusal
    assert verdict.homeless == ("other",)
