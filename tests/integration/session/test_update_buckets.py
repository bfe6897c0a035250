"""`octavo.update` in several calls, as trainers send buckets, and by the names that their wrappers make."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import octavo
from helpers import write_checkpoint
from helpers.coded import FINE_GRAINED, fine_grained
from helpers.folders import tensors_of
from helpers.models import differences
from octavo.errors import LoaderError, UpdateError

pytest.importorskip("transformers")

from _models import make_checkpoint
from transformers import AutoModel

UP, DOWN = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))


def new_of(folder: Path) -> dict[str, Tensor]:
    return {name: (tensor * 1.7).to(tensor.dtype) for name, tensor in tensors_of(folder).items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 1}
    return make_checkpoint("llama", tmp_path_factory.mktemp("plain") / "llama", **sizes)


@pytest.fixture(scope="module")
def coded(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """New weights in FP8 blocks, and models that were loaded with them."""
    stored = fine_grained(new_of(plain))
    folder = write_checkpoint(
        tmp_path_factory.mktemp("coded"),
        stored,
        config={**octavo.load(plain).config.to_dict(), "quantization_config": FINE_GRAINED},
    )
    return stored, {scheme: octavo.load(folder, scheme) for scheme in ("fp8_block", "int8_channel")}


def buckets(pairs: list[tuple[str, Tensor]], *cuts: int) -> Iterator[dict[str, Tensor]]:
    """Views of memory that is another's when the next is asked for."""
    for begin, end in zip((0, *cuts), (*cuts, len(pairs)), strict=True):
        bucket = {name: tensor.clone() for name, tensor in pairs[begin:end]}
        yield bucket
        for tensor in bucket.values():
            tensor.view(torch.uint8).fill_(1)


@pytest.mark.parametrize("scheme", ["fp8_block", "int8_channel"])
@pytest.mark.parametrize("as_given", [lambda bucket: bucket, lambda bucket: iter(bucket.items())], ids=["dict", "iter"])
@pytest.mark.parametrize("order", ["pairs", "scales last", "scales first"])
def test_numbers_and_scales_of_two_calls_are_one_weight(
    scheme: str, order: str, as_given: Any, plain: Path, coded: Any
) -> None:
    stored, loaded = coded
    model = octavo.load(plain, scheme)
    pairs = sorted(stored.items(), key=lambda pair: (order != "pairs" and pair[0].endswith("_scale_inv"), pair[0]))
    if order == "scales first":
        pairs.reverse()
    cut = 1 + next(at for at, (name, _) in enumerate(pairs) if name.removesuffix("_scale_inv") == UP)
    for bucket in buckets(pairs, cut):
        report = octavo.update(model, as_given(bucket), more=True)
        assert bool(report.waiting) == (len(bucket) == cut)
    report = octavo.update(model, [])
    assert report.waiting == []
    assert "model.layers.0.mlp.up_proj" in report.updated
    assert differences(model, loaded[scheme]) == []


def test_what_never_comes_is_named_in_the_last_call_and_is_not_kept(plain: Path, coded: Any) -> None:
    stored, loaded = coded
    model = octavo.load(plain, "fp8_block")
    octavo.update(model, {DOWN: stored[DOWN], f"{DOWN}_scale_inv": stored[f"{DOWN}_scale_inv"]}, more=True)
    assert octavo.update(model, {UP: stored[UP]}, more=True).waiting == [UP]
    with pytest.raises(UpdateError, match=f"{UP} is e4m3fn, and its scales did not come") as caught:
        octavo.update(model, {})
    assert caught.value.new == ("model.layers.0.mlp.down_proj",)
    assert caught.value.torn == ()
    with pytest.raises(UpdateError, match=f"{UP}_scale_inv came without {UP} in FP8"):  # an older one's
        octavo.update(model, {f"{UP}_scale_inv": stored[f"{UP}_scale_inv"]})
    octavo.update(model, stored)
    assert differences(model, loaded["fp8_block"]) == []


def test_what_waits_is_bounded_by_staging_bytes(plain: Path) -> None:
    model, size = octavo.load(plain, "fp8_block"), 1 << 20
    many = {f"model.layers.0.self_attn.{name}_proj.weight": torch.ones(size // 256, 256) for name in "qkvo"}
    numbers = {name: tensor.to(octavo.schemes.FP8) for name, tensor in many.items()}
    text = r"2 tensors wait for their scales.*2\.00 MiB, more than staging_bytes \(1\.00 MiB\): .*q_proj.*k_proj"
    with pytest.raises(UpdateError, match=text):
        octavo.update(model, iter(numbers.items()), staging_bytes=size)
    with pytest.raises(UpdateError, match=text):
        octavo.update(model, numbers, staging_bytes=size, more=True)


def test_a_call_that_fails_tells_of_the_calls_before_it(plain: Path) -> None:
    model, new = octavo.load(plain), new_of(plain)
    octavo.update(model, {UP: new[UP]}, more=True)
    with pytest.raises(UpdateError, match=f"{UP}.* is written twice: .*calls with more=True are one update") as caught:
        octavo.update(model, {DOWN: new[DOWN], UP: new[UP]}, more=True)
    assert caught.value.new == ("model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj")
    octavo.update(model, {UP: new[UP]})  # it was over


def test_a_model_that_changed_between_two_calls_is_not_written(plain: Path) -> None:
    model, new = octavo.load(plain), new_of(plain)
    octavo.update(model, {UP: new[UP]}, more=True)
    model.model.norm.to(torch.float32)
    with pytest.raises(LoaderError, match="changed between two calls of one update"):
        octavo.update(model, {DOWN: new[DOWN]})


def test_a_copy_of_a_model_has_no_update_that_waits(plain: Path, coded: Any) -> None:
    model = octavo.load(plain, "fp8_block")
    octavo.update(model, {UP: coded[0][UP]}, more=True)
    other = copy.deepcopy(model)
    octavo.update(other, {})
    with pytest.raises(UpdateError, match="its scales did not come"):
        octavo.update(model, {})


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}".replace(".up_proj.", ".up_proj.base_layer."),
        lambda name: f"base_model.model.{name}".replace(".up_proj.", ".up_proj.modules_to_save.default."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace(".mlp.", "._fsdp_wrapped_module.mlp."),
        lambda name: f"module.{name}".replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda name: name.removeprefix("model."),
    ],
    ids=["compile", "ddp", "peft", "peft, trained as a whole", "fsdp", "checkpointing", "base model"],
)
def test_names_that_a_trainers_wrappers_make_are_understood(wrapped: Any, plain: Path, coded: Any) -> None:
    stored, loaded = coded
    model = octavo.load(plain, "fp8_block")
    octavo.update(model, ((wrapped(name), tensor) for name, tensor in stored.items()))
    assert differences(model, loaded["fp8_block"]) == []


def compiled_within(model: Any) -> Any:
    model.model = torch.compile(model.model)
    return model


def with_an_adapter(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the wrappers' own imports
@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        compiled_within,
        torch.nn.DataParallel,
        lambda model: torch.nn.ModuleDict({"policy": model}),
        with_an_adapter,
        lambda model: with_an_adapter(model).base_model.model,
    ],
    ids=["compile", "a part of it", "data parallel", "in another model", "peft", "within peft's"],
)
def test_a_model_that_was_wrapped_takes_names_of_its_checkpoint(wrap: Any, plain: Path, coded: Any) -> None:
    stored, loaded = coded
    model = octavo.load(plain, "fp8_block")
    parameters = dict(model.named_parameters())
    octavo.update(wrap(model), stored)
    for name, new in loaded["fp8_block"].named_parameters():
        assert torch.equal(parameters[name].data.view(torch.uint8), new.data.view(torch.uint8)), name


def test_a_tensor_of_what_the_model_has_lost_is_refused_by_name(plain: Path) -> None:
    model = octavo.load(plain, "fp8_block")
    model.lm_head = torch.nn.Identity()
    with pytest.raises(UpdateError, match=r"lm_head.weight goes into lm_head.weight, which the model has lost"):
        octavo.update(model, new_of(plain))


def test_a_base_model_takes_names_of_the_whole(plain: Path, tmp_path: Path) -> None:
    config = octavo.OctavoConfig("int8_channel")
    AutoModel.from_pretrained(plain, quantization_config=config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    new = {name: tensor for name, tensor in new_of(plain).items() if name != "lm_head.weight"}
    octavo.update(model, new)
    expected = octavo.load(plain, "int8_channel")
    octavo.update(expected, new)
    assert differences(model, expected.model) == []


def test_two_names_of_one_tensor_are_two_tensors_for_it(plain: Path) -> None:
    model, new = octavo.load(plain), new_of(plain)
    with pytest.raises(UpdateError, match=f"{UP}.* is written twice"):
        octavo.update(model, {UP: new[UP], f"_orig_mod.{UP}": new[UP]})


def test_an_adapter_has_to_be_merged(plain: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    with pytest.raises(UpdateError, match=rf"{name} is an adapter's\. Merge the adapter"):
        octavo.update(octavo.load(plain), {name: torch.ones(4, 256)})


def test_what_peft_has_not_trained_has_to_be_dropped(plain: Path) -> None:
    name, instead = (
        f"base_model.model.lm_head.{each}.weight" for each in ("original_module", "modules_to_save.default")
    )
    with pytest.raises(
        UpdateError, match=f"{name} is what peft keeps .* has not been trained. .* what counts is {instead}"
    ):
        octavo.update(octavo.load(plain), {name: torch.ones(4, 256)})


def test_the_report_when_printed_says_what_is_new_and_what_waits(plain: Path) -> None:
    model, stored = octavo.load(plain), fine_grained(new_of(plain))
    report = octavo.update(model, [(UP, stored[UP]), (DOWN, stored[DOWN])], more=True)
    assert f"waiting for the next call: {UP} and {DOWN}" in str(report)
    report = octavo.update(model, [(f"{name}_scale_inv", stored[f"{name}_scale_inv"]) for name in (UP, DOWN)])
    up, down = (name.removesuffix(".weight") for name in (UP, DOWN))
    assert f"updated 2 layers: {up} and {down}" in str(report).replace(f"{down} and {up}", f"{up} and {down}")
    assert "waiting" not in str(report)
