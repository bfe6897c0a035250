"""Loaders with threads of their own, in a process of its own, since one that is wrong ends it.

Prints what came, as JSON: of each deed of a thread, and of so many rounds (the argument) of three threads that do any
of them at any time.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import octavo
from helpers import same_bytes
from octavo.errors import OctavoError
from octavo.numerics import schemes

Parameters = dict[str, nn.Parameter]


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 128), nn.Linear(128, 256)).bfloat16()


VALUES = {name: parameter.detach().clone() for name, parameter in made().named_parameters()}
FIRST = "0.weight"

#: what a thread does with the parameters, the model, and a tensor that sees the first parameter
DEEDS: dict[str, Callable[[Parameters, nn.Module, Tensor], Any]] = {
    "copies all": lambda p, m, a: [parameter.data.copy_(VALUES[name]) for name, parameter in p.items()],
    "copies one": lambda p, m, a: p[FIRST].data.copy_(VALUES[FIRST]),
    "copies rows": lambda p, m, a: p[FIRST].data[3:5].copy_(VALUES[FIRST][3:5]),
    "copies through an older view": lambda p, m, a: a.copy_(VALUES[FIRST]),
    "copies under no_grad": lambda p, m, a: torch.no_grad()(lambda: p[FIRST].copy_(VALUES[FIRST]))(),
    "scales": lambda p, m, a: p[FIRST].data.mul_(2),
    "fills": lambda p, m, a: p[FIRST].data.normal_(),
    "writes as numpy": lambda p, m, a: p[FIRST].detach().view(torch.int16).numpy().fill(3),
    "reads": lambda p, m, a: p[FIRST].sum().item(),
    "reads through an older view": lambda p, m, a: a.sum().item(),
    "takes a state dict": lambda p, m, a: {name: tensor.clone() for name, tensor in m.state_dict().items()},
    "loads a state dict": lambda p, m, a: m.load_state_dict(VALUES),
    "copies the model": lambda p, m, a: copy.deepcopy(m),
    "runs the model": lambda p, m, a: m(torch.ones(1, 256).bfloat16()),
}


def in_a_thread(deed: Callable[[], Any]) -> None:
    def do() -> None:
        with contextlib.suppress(RuntimeError, OctavoError, TypeError):  # torch may refuse it; only a crash is wrong
            deed()

    thread = threading.Thread(target=do)
    thread.start()
    thread.join()


def right(model: nn.Module) -> bool:
    for at, name in (("0", "0.weight"), ("1", "1.weight")):
        q, scale = schemes.quantize(VALUES[name], "fp8_channel")
        layer: Any = model.get_submodule(at)
        if not (same_bytes(layer.weight.data, q) and same_bytes(layer.weight_scale.data, scale)):
            return False
    return all(same_bytes(model.get_parameter(f"{at}.bias").data, VALUES[f"{at}.bias"]) for at in "01")


def outcome(deed: Callable[[Parameters, nn.Module, Tensor], Any], loads: bool, meta: bool) -> str:
    """``right``, ``wrong``, or the name of octavo's error."""
    model = made().to("meta") if meta else made()
    parameters = dict(model.named_parameters())
    alias = parameters[FIRST].detach()
    try:
        with octavo.layerwise(model) as session:
            if loads:
                session.load([(FIRST, VALUES[FIRST])])
            in_a_thread(lambda: deed(parameters, model, alias))
            if loads:
                session.load([pair for pair in VALUES.items() if pair[0] != FIRST])
    except OctavoError as error:
        for parameter in parameters.values():
            str(parameter)
        return type(error).__name__
    finally:
        in_a_thread(lambda: deed(parameters, model, alias))  # a thread that does not know that the session is over
    return "right" if right(model) else "wrong"


def work(stop: threading.Event, choose: random.Random, *given: Any) -> None:
    while not stop.is_set():
        # the model changes meanwhile
        with contextlib.suppress(RuntimeError, OctavoError, TypeError, AttributeError):
            choose.choice([*DEEDS.values()])(*given)


def torture(rounds: int) -> list[str]:
    found = []
    for seed in range(rounds):
        choose, model = random.Random(seed), made()
        parameters, stop = dict(model.named_parameters()), threading.Event()
        alias = parameters[FIRST].detach()

        given = parameters, model, alias
        threads = [threading.Thread(target=work, args=(stop, random.Random(seed + i), *given)) for i in range(3)]
        try:
            with octavo.layerwise(model) as session:
                for thread in threads:
                    thread.start()
                pairs = [*VALUES.items()]
                choose.shuffle(pairs)
                session.load(pairs)
            found.append("loaded")  # and what threads do to it afterwards is their doing
        except OctavoError as error:
            found.append(type(error).__name__)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    return found


def cases() -> dict[str, str]:
    """Deed -> what came of it: while it or others load, of a model that is real or on meta."""
    return {
        f"{name}, {'while another loads' if loads else 'alone'}, {'meta' if meta else 'real'}": outcome(
            deed, loads, meta
        )
        for name, deed in DEEDS.items()
        for loads in (True, False)
        for meta in (False, True)
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps([cases(), torture(int(sys.argv[1]))]))
