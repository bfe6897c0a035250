"""Models spread over devices, both ways: `octavo.load` with a map, and ``from_pretrained`` with an `OctavoConfig`.

torch takes ``cpu`` and ``cpu:0`` for two devices, and both are this machine's: so maps, streams, accelerate's hooks and
what it lends to another device run here. Where maps are automatic, this machine is told to have accelerators.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate.hooks
import pytest
import torch
import transformers.integrations.accelerate as integration
from _models import Checkpoints, logits, make_checkpoint
from transformers import AutoModelForCausalLM

import octavo
from helpers.device_maps import ROUTES, from_pretrained, load
from helpers.folders import tensors_of
from helpers.models import differences
from octavo.adapters.transformers import devices
from octavo.adapters.transformers.load import prepare
from octavo.checkpoint.checkpoint import Checkpoint
from octavo.errors import DeviceError, LoaderError

#: of a model whose second layer and head are on another device
APART = {
    "model.embed_tokens": "cpu:0",
    "model.layers.0": "cpu:0",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


by_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


@pytest.fixture(autouse=True)
def one_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch copies a parameter from ``cpu`` to ``cpu:0``, to a tensor that is none; a GPU has one name."""
    place = accelerate.hooks.set_module_tensor_to_device

    def placed(module: Any, name: str, device: Any, **options: Any) -> None:
        place(module, name, "cpu" if device == "cpu:0" else device, **options)

    monkeypatch.setattr(accelerate.hooks, "set_module_tensor_to_device", placed)


def gathered(model: Any) -> dict[str, torch.Tensor]:
    """A model's state, of which accelerate has what it lends."""
    state = dict(model.state_dict())
    for path, module in model.named_modules():
        held = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                assert held is not None, path
                state[f"{path}.{leaf}"] = held[leaf]
    return state


# -- maps that name modules -------------------------------------------------------------------------------------------


@by_route
@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
def test_a_model_on_two_devices_answers_as_on_one(checkpoints: Checkpoints, architecture: str, route: Any) -> None:
    """What is on ``cpu`` is lent to ``cpu:0``, as to a GPU."""
    alone = checkpoints.load(architecture, "fp8_channel")
    model = route(checkpoints.folder(architecture), APART)
    assert model.hf_device_map == APART
    assert model.get_parameter("model.layers.1.self_attn.q_proj.weight").is_meta
    state = gathered(model)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for _ in range(2):
        assert torch.equal(logits(model), logits(alone))
    tokens = [m.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False) for m in (model, alone)]
    assert torch.equal(*tokens)


@by_route
def test_weights_that_other_code_reads_are_lent_like_others(checkpoints: Checkpoints, route: Any) -> None:
    """OPT and others ask a layer for its weight's dtype; peft would for more."""
    from octavo.running.modules import ReadLinear

    folder = checkpoints.folder("llama")
    model, alone = route(folder, APART), octavo.load(folder)
    for spread in (model, alone):
        for layer in spread.model.layers:
            assert layer.mlp.down_proj.compute_dtype == torch.bfloat16
            assert type(layer.mlp.down_proj) is ReadLinear
    for _ in range(2):
        assert torch.equal(logits(model), logits(alone))


@by_route
def test_a_map_of_one_device_installs_no_hooks(checkpoints: Checkpoints, route: Any) -> None:
    model = route(checkpoints.folder("llama"), {"": "cpu"})
    assert not hasattr(model, "hf_device_map")
    assert differences(model, checkpoints.load("llama", "fp8_channel")) == []


@by_route
def test_a_map_that_leaves_a_layer_out_is_refused(checkpoints: Checkpoints, route: Any) -> None:
    without = {module: device for module, device in APART.items() if module != "model.layers.1"}
    with pytest.raises(DeviceError, match=r"names no device for model.layers.1.\w+"):
        route(checkpoints.folder("llama"), without)


@by_route
def test_a_map_of_what_the_model_does_not_have_is_refused(checkpoints: Checkpoints, route: Any) -> None:
    with pytest.raises(DeviceError, match=r"names 'model.layer.1', .* no such module; the nearest is 'model.layers.1'"):
        route(checkpoints.folder("llama"), {**APART, "model.layer.1": "cpu"})


@by_route
def test_room_holds_without_an_accelerator(
    checkpoints: Checkpoints, route: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "accelerators", list)
    folder = checkpoints.folder("llama")
    assert not hasattr(route(folder, "auto"), "hf_device_map")
    with pytest.raises(DeviceError, match="on disk, and octavo holds weights in memory"):
        route(folder, "auto", max_memory={"cpu": 1000})


@by_route
def test_a_map_may_leave_out_what_no_checkpoint_holds(checkpoints: Checkpoints, route: Any) -> None:
    without = {module: device for module, device in APART.items() if module != "model.rotary_emb"}
    model = route(checkpoints.folder("llama"), without)
    assert torch.equal(logits(model), logits(checkpoints.load("llama", "fp8_channel")))


@by_route
def test_tied_weights_on_two_devices_are_refused_and_on_one_tied(checkpoints: Checkpoints, route: Any) -> None:
    folder = checkpoints.folder("gemma2")
    with pytest.raises(
        DeviceError, match=r"tied on several devices .*lm_head.weight on cpu, model.embed_tokens.weight"
    ):
        route(folder, APART)
    together = {**APART, "lm_head": "cpu:0"}
    model = route(folder, together)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), logits(checkpoints.load("gemma2", "fp8_channel")))


@by_route
@pytest.mark.parametrize(
    ("device_map", "says"),
    [
        ({**APART, "lm_head": "disk"}, "device_map has 'lm_head' on disk"),
        ({**APART, "lm_head": "cuda:7"}, "device 'cuda:7' can't be used here"),
        ("disk", "device_map has the whole model on disk"),
    ],
)
def test_a_device_that_can_hold_nothing_is_refused(
    checkpoints: Checkpoints, route: Any, device_map: Any, says: str
) -> None:
    if route is from_pretrained and device_map == "disk":
        return  # transformers refuses it itself
    with pytest.raises(DeviceError, match=says):
        route(checkpoints.folder("llama"), device_map)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device_map": "auto", "device": "cuda"}, "both say where the model goes"),
        ({"max_memory": {0: "1GiB"}}, "max_memory is for a device_map that decides by it"),
        ({"device_map": "cpu", "max_memory": {0: "1GiB"}}, "max_memory is for a device_map that decides by it"),
        ({"device_map": 1.5}, "device_map is 1.5: neither a device nor modules"),
        ({"device_map": "AUTO"}, "device_map names 'AUTO': no device"),
        ({"device_map": {"": None}}, "device_map names None: no device"),
        ({"device_map": {"": "cpu", "lm_head": "meta"}}, "device_map names 'meta' for lm_head: no device"),
        ({"device_map": True}, "device_map names True: no device"),
        ({"device_map": "auto", "max_memory": "1GiB"}, "max_memory is '1GiB', and not devices"),
        ({"device_map": "auto", "max_memory": {7: "1GiB"}}, "device 'cuda:7' can't be used here"),
        ({"device_map": "auto", "max_memory": {"cpu": "lots"}}, "max_memory={'cpu': 'lots'}"),
        ({"device_map": "auto", "max_memory": {"gpu": "1GiB"}}, "Device gpu is not recognized"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    checkpoints: Checkpoints, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(DeviceError, match=says):
        octavo.load(checkpoints.folder("llama"), **options)


@pytest.mark.parametrize("device_map", ["gpu", {"": "CPU"}, {"": -1}])
def test_a_plan_is_for_devices_that_could_be(checkpoints: Checkpoints, device_map: Any) -> None:
    with pytest.raises(DeviceError, match=r"device_map names .*: no device"):
        octavo.plan(checkpoints.folder("llama"), device_map=device_map)


def test_a_model_that_was_saved_is_spread_too(checkpoints: Checkpoints, tmp_path: Path) -> None:
    alone = checkpoints.load("qwen2_moe", "fp8_channel")
    alone.save_pretrained(tmp_path)
    for model in (load(tmp_path, APART), AutoModelForCausalLM.from_pretrained(tmp_path, device_map=APART)):
        assert torch.equal(logits(model), logits(alone))


def test_weights_that_are_lent_are_not_updated(checkpoints: Checkpoints) -> None:
    folder = checkpoints.folder("llama")
    with pytest.raises(LoaderError, match=r"model.layers.1.\S+ has no memory of its own: accelerate keeps it on"):
        octavo.update(load(folder, APART), tensors_of(folder))


# -- automatic maps ---------------------------------------------------------------------------------------------------


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[Any, int]], None]:
    """Two devices are accelerators 0 and 1; the function says what they have free."""
    names = ["cpu:0", "cpu"]
    infer = integration.infer_auto_device_map

    def translated(*args: Any, **options: Any) -> dict[str, Any]:
        return {module: names[d] if isinstance(d, int) else d for module, d in infer(*args, **options).items()}

    monkeypatch.setattr(integration, "infer_auto_device_map", translated)
    monkeypatch.setattr(devices, "accelerators", lambda: names)

    def free(memory: Mapping[Any, int]) -> None:
        monkeypatch.setattr(devices, "free_bytes", memory.get)
        maximum = integration.accelerate_max_memory
        monkeypatch.setattr(
            integration, "accelerate_max_memory", lambda asked=None: maximum(asked) if asked else dict(memory)
        )

    return free


def parts_of(folder: Path, model: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each layer of a model in FP8, and what else there is."""
    layers: dict[str, int] = {}
    others: dict[str, int] = {}
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        path = name.split(".")
        where, key = (layers, ".".join(path[:3])) if path[1] == "layers" else (others, ".".join(path[:-1]))
        where[key] = where.get(key, 0) + tensor.nbytes
    return layers, others


def where(model: Any, *modules: str) -> list[str]:
    place = devices.placer(model.hf_device_map, model)
    return [place(f"{module}.weight") for module in modules]


@by_route
def test_an_automatic_map_counts_what_a_layer_takes_in_fp8(checkpoints: Checkpoints, route: Any, two: Any) -> None:
    folder, alone = checkpoints.folder("qwen2_moe"), checkpoints.load("qwen2_moe", "fp8_channel")
    layers, others = parts_of(folder, alone)
    embedding, largest = others["model.embed_tokens"], max(*layers.values(), others["lm_head"])
    # the first holds embedding and first layer, and room for the largest module, by a byte
    room = embedding + layers["model.layers.0"] + largest
    for spare, first in ((0, "cpu:0"), (-1, "cpu")):
        two({0: 1 << 40, 1: 1 << 40})
        model = route(folder, "sequential", max_memory={0: room + spare, 1: 1 << 40})
        assert where(model, "model.embed_tokens", "model.layers.0", "model.layers.1") == ["cpu:0", first, "cpu"]
        assert torch.equal(logits(model), logits(alone))


@by_route
def test_an_automatic_map_leaves_room_for_staging_in_what_is_free(
    checkpoints: Checkpoints, route: Any, two: Any
) -> None:
    folder, alone = checkpoints.folder("llama"), checkpoints.load("llama", "fp8_channel")
    layers, others = parts_of(folder, alone)
    room = others["model.embed_tokens"] + layers["model.layers.0"] + max(*layers.values(), others["lm_head"])
    for spare, first in ((0, "cpu:0"), (-1, "cpu")):
        two({0: room + (256 << 20) + spare, 1: 1 << 40, "cpu": 1 << 40})
        model = route(folder, "sequential")
        assert where(model, "model.layers.0") == [first]


@by_route
def test_what_fits_nowhere_is_refused(checkpoints: Checkpoints, route: Any, two: Any) -> None:
    two({0: 1 << 40, 1: 1 << 40, "cpu": 1 << 40})
    with pytest.raises(DeviceError, match="on disk, and octavo holds weights in memory"):
        route(checkpoints.folder("llama"), "auto", max_memory={0: 100_000, 1: 100_000, "cpu": 1000})


@by_route
@pytest.mark.parametrize("device_map", ["auto", "balanced"])
def test_no_layer_is_split(device_map: str, route: Any, two: Any, tmp_path: Path) -> None:
    two({0: 1 << 40, 1: 1 << 40, "cpu": 1 << 40})
    folder = make_checkpoint("qwen2_moe", tmp_path, num_hidden_layers=6)
    model = route(folder, device_map)
    assert {path for path in model.hf_device_map if "layers" in path} == {f"model.layers.{n}" for n in range(6)}
    assert set(model.hf_device_map.values()) == {"cpu", "cpu:0"}
    assert torch.equal(logits(model), logits(octavo.load(folder)))


@pytest.mark.parametrize("architecture", ["qwen2_moe", "opt", "gemma2"])
def test_a_plan_may_be_for_devices_that_are_not_here(architecture: str, tmp_path: Path) -> None:
    folder = make_checkpoint(architecture, tmp_path, num_hidden_layers=6)
    alone = octavo.plan(folder)
    room = alone.final_bytes()
    plan = octavo.plan(folder, device_map="auto", max_memory={0: room, 1: room, "cpu": 0})
    assert set(plan.devices) == {"cuda:0", "cuda:1"}
    assert sum(plan.final_bytes(device) for device in plan.devices) == plan.final_bytes() == alone.final_bytes()
    assert all(plan.final_bytes(device) <= room for device in plan.devices)
    told = json.loads(json.dumps(plan.to_dict()))["devices"]
    assert all(told[d]["peak_bytes"] <= told[d]["final_bytes"] + plan.staging_bytes for d in plan.devices)


@pytest.mark.parametrize("architecture", ["llama", "qwen2_moe", "gpt_oss", "opt", "gemma2", "deepseek_v3"])
def test_spreading_a_plan_over_one_device_changes_nothing(checkpoints: Checkpoints, architecture: str) -> None:
    prepared = prepare(Checkpoint.open(checkpoints.folder(architecture)), octavo.Recipe())
    again = devices.spread(replace(prepared.plan, other_bytes={}), prepared.model, {"": "cpu"})
    assert again == prepared.plan


def test_a_plan_tells_what_an_accelerator_is_lent(checkpoints: Checkpoints) -> None:
    plan = octavo.plan(checkpoints.folder("llama"), device_map={"model": "cuda", "lm_head": "cpu"})
    assert set(plan.devices) == {"cuda:0", "cpu"}
    nbytes = 260 * 136 * 2
    assert plan.final_bytes("cpu") == nbytes
    assert f"{nbytes / 1024:.2f} KiB are on the CPU, and copied to an accelerator each time they are used" in plan.notes
