"""From dry runs to decisions, on toy models that load as vLLM's do: fused, sharded, with scales beside FP8."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from helpers import headers
from helpers.vllm_toys import Toy, empty
from octavo import Recipe
from octavo.adapters.engine.survey import Surveyor
from octavo.conversion import formats
from octavo.errors import CoverageError, RecipeError
from octavo.planning.plan import plan_checkpoint

LAYOUT = formats.get("compressed-tensors")
OF_INT8 = formats.get("compressed-tensors-w8a8")


SHAPES = {"gate_proj.weight": (256, 256), "up_proj.weight": (256, 256), "down_proj.weight": (256, 256), "norm": (256,)}


def survey(model, scheme="fp8_channel", shapes=SHAPES, dtype="BF16", ignore=(), **options):
    plan = plan_checkpoint(headers(shapes, dtype), Recipe(scheme, ignore=ignore))
    layout = OF_INT8 if scheme == "int8_channel" else LAYOUT
    return Surveyor(model, model.load_weights, plan, layout, engine="vLLM", **options).run()


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block", "int8_channel", "nvfp4"])
def test_fused_and_sharded_layers_are_quantized(scheme, ranks):
    found = survey(Toy(scheme, ranks), scheme)
    assert not found.keep
    assert found.layers == 2
    assert [p.name for p in found.plan.quantized] == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    assert [p.name for p in found.plan.kept] == ["norm"]


def test_each_layer_is_filled_by_its_tensors_and_their_scales():
    found = survey(Toy(quantized=("gate_up_proj",)))
    weights, scales = frozenset({"weight"}), frozenset({"weight_scale"})
    assert found.fillers == {
        "gate_up_proj": {
            "gate_proj.weight": weights,
            "gate_proj.weight_scale": scales,
            "up_proj.weight": weights,
            "up_proj.weight_scale": scales,
        },
        "down_proj": {"down_proj.weight": weights},
        "": {"norm": frozenset({"norm"})},
    }


def test_a_layer_of_nvfp4_is_filled_by_packed_numbers_and_two_scales():
    found = survey(Toy("nvfp4", quantized=("down_proj",)), "nvfp4").fillers["down_proj"]
    kinds = ("weight_packed", "weight_scale", "weight_global_scale")
    assert found == {f"down_proj.{kind}": frozenset({kind}) for kind in kinds}


def test_what_nobody_takes_is_not_read():
    found = survey(Toy(), shapes={"extra.weight": (64, 64), **SHAPES})
    assert found.unread == ("extra.weight",)
    assert "extra.weight" not in [p.name for p in found.plan.placements]


@pytest.mark.parametrize("scheme", ["fp8_channel", "nvfp4"])
def test_what_vllm_keeps_is_not_quantized(scheme):
    found = survey(Toy(scheme, quantized=("gate_up_proj",)), scheme)
    assert not found.keep
    assert {p.name: p.reason for p in found.plan.kept}["down_proj.weight"] == "vLLM keeps this layer unquantized"
    assert found.layers == 1


@pytest.mark.parametrize("scheme", ["fp8_channel", "int8_channel", "nvfp4"])
def test_an_ignored_tensor_in_a_quantized_layer_has_the_layer_kept(scheme):
    model = Toy(scheme)
    found = survey(model, scheme, ignore=["down_proj"])
    assert found.keep == {"down_proj": "ignored by 'down_proj'"}
    assert not found.refused
    assert {*dict(model.named_parameters())} == {*dict(Toy(scheme).named_parameters())}
    again = survey(Toy(scheme, quantized=("gate_up_proj",)), scheme, ignore=["down_proj"], kept=found.keep)
    assert {p.name: p.reason for p in again.plan.kept}["down_proj.weight"] == "ignored by 'down_proj'"


def test_part_of_a_fused_layer_cant_be_ignored():
    with pytest.raises(
        RecipeError, match=r"gate_proj.weight is ignored by 'gate_proj', but vLLM fuses it into gate_up_proj"
    ):
        survey(Toy(), ignore=["gate_proj"])


@pytest.mark.parametrize(
    ("down", "why"),
    [
        ("no scales", "vLLM's loader passes over its scale"),
        ("refused", "vLLM's loader does not take it with a scale (ValueError: what is this?)"),
        ("permuted", "vLLM's loader rearranges it in a way that scales can't follow"),
        ("shifted", "vLLM's loader does not cut its scale as it cuts the weight"),
    ],
)
def test_what_the_loader_cant_take_keeps_its_layer_unquantized(down, why):
    found = survey(Toy(down=down))
    assert found.keep == {"down_proj": why}
    assert found.refused == {"down_proj.weight": why}
    again = survey(Toy(down=down, quantized=("gate_up_proj",)), kept=found.keep)
    assert not again.keep
    assert {p.name: p.reason for p in again.plan.kept}["down_proj.weight"] == why


@pytest.mark.parametrize(
    ("shapes", "text"),
    [
        (
            {name: shape for name, shape in SHAPES.items() if name != "up_proj.weight"},
            "gate_up_proj.weight [512, 256]: only gate_proj.weight goes there; 65,536 of 131,072 elements come from no "
            "checkpoint tensor: [256:512, 0:256]",
        ),
        (
            {name: shape for name, shape in SHAPES.items() if name != "down_proj.weight"},
            "down_proj.weight [256, 256]: comes from no tensor of the checkpoint",
        ),
        ({**SHAPES, "strange.weight": (2, 2)}, "Toy in vLLM does not take the tensor 'strange.weight' (KeyError"),
        ({**SHAPES, "up_proj.weight": (100, 256)}, "does not take the tensor 'up_proj.weight' (RuntimeError"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(shapes, text):
    with pytest.raises(CoverageError, match=re.escape(text)):
        survey(Toy(), shapes=shapes)


def test_a_loader_that_takes_all_tensors_first_is_asked_which_it_refused():
    class Hoarding(Toy):
        def load_weights(self, weights):
            super().load_weights(list(weights))

    found = survey(Hoarding(down="hoarded"))
    assert list(found.refused) == ["down_proj.weight"]


def test_all_that_is_missing_is_named_at_once():
    with pytest.raises(CoverageError) as caught:
        survey(Toy(), shapes={"gate_proj.weight": (256, 256)})
    for name in ("gate_up_proj.weight ", "gate_up_proj.weight_scale ", "down_proj.weight ", "norm "):
        assert name in str(caught.value)


def test_an_element_that_is_written_twice_is_an_error():
    class Twice(Toy):
        def load_weights(self, weights):
            super().load_weights((name.replace("again", "down_proj"), weight) for name, weight in weights)

    with pytest.raises(CoverageError, match=r"down_proj.weight \[256, 256\]: .* both fill \[0:256, 0:256\]"):
        survey(Twice(), shapes={**SHAPES, "again.weight": (256, 256)})


def test_what_will_be_replaced_may_come_twice_or_not_at_all():
    """Layers that draft bring copies of the model's embedding and head; the last one is read."""

    class Draft(Toy):
        def load_weights(self, weights):
            super().load_weights((name.replace("copy of ", ""), weight) for name, weight in weights)

    found = survey(Draft(), shapes={**SHAPES, "copy of norm": (256,)}, replaced=lambda: ["norm"])
    assert found.unread == ("norm",)
    assert [p.name for p in found.plan.kept] == ["copy of norm"]
    shapes = {name: shape for name, shape in SHAPES.items() if name != "norm"}
    assert not survey(Draft(), shapes=shapes, replaced=lambda: ["norm"]).keep
    with pytest.raises(CoverageError, match=r"norm \[256\]: .* both fill \[0:256\]"):
        survey(Draft(), shapes={**SHAPES, "copy of norm": (256,)})


def test_parameters_that_no_checkpoint_has_are_exempt():
    class WithCacheScale(Toy):
        def __init__(self):
            super().__init__()
            self.k_scale = empty()

    with pytest.raises(CoverageError, match="k_scale"):
        survey(WithCacheScale())
    assert survey(WithCacheScale(), exempt={"k_scale"}).layers == 2


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3"])
def test_numbers_that_are_no_weights_are_refused(dtype):
    """Copied into a parameter, they would be taken for weights."""
    dtypes = dict.fromkeys(SHAPES, "BF16") | {"norm": dtype}
    with pytest.raises(CoverageError, match=f"norm goes there, which is {dtype}"):
        survey(Toy(), dtype=dtypes)


class Padding(nn.Module):
    """Fills up with zeros what is too small, as SGLang does on a CPU: its layers' rows are a multiple of 32."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 64, bias=False, device="meta", dtype=torch.bfloat16) for _ in "abc")
        self.wide = nn.ModuleList([nn.Linear(16, 96, bias=False, device="meta", dtype=torch.bfloat16)])

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            parameters[name].data[len(weight) :].zero_()
            parameters[name].data[: len(weight)].copy_(weight)


@pytest.mark.parametrize("rows", [64, 40])
def test_padding_is_for_all_tensors_that_are_alike_and_for_no_single_one(rows):
    shapes = {f"layers.{number}.weight": (rows, 16) for number in range(3)} | {"wide.0.weight": (80, 16)}
    assert survey(Padding(), scheme=None, shapes=shapes).unread == ()
    says = f"layers.1.weight [64, 16]: layers.1.weight has the shape [33, 16], where layers.0.weight has [{rows}, 16]"
    with pytest.raises(CoverageError, match=re.escape(says)):
        survey(Padding(), scheme=None, shapes={**shapes, "layers.1.weight": (33, 16)})
