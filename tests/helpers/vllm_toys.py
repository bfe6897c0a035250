"""Toy models that load as vLLM's do: fused and sharded layers, scales beside FP8."""

from __future__ import annotations

import torch
from torch import nn

from octavo.numerics import schemes
from octavo.numerics.schemes import FP8


def empty(*shape, dtype=torch.bfloat16):
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Layer(nn.Module):
    """A linear layer of vLLM: a weight [out, in] with its scale, or in bf16; ``parts`` are fused in it.

    ``int8_packed`` is int8_channel with four numbers in one.
    """

    def __init__(self, rows, cols, scheme, parts=1):
        super().__init__()
        if scheme == "nvfp4":
            self.weight_packed = empty(rows, cols // 2, dtype=torch.uint8)
            self.weight_scale = empty(rows, cols // 16, dtype=FP8)
            self.weight_global_scale = empty(parts, dtype=torch.float32)
            return
        if scheme == "int8_packed":
            self.weight_packed = empty(rows, cols // 4, dtype=torch.int32)
            self.weight_scale = empty(rows, 1)
            self.weight_shape = empty(2, dtype=torch.int64)
            return
        self.weight = empty(rows, cols, dtype=schemes.get(scheme).dtype if scheme else torch.bfloat16)
        if scheme in ("fp8_channel", "int8_channel"):
            self.weight_scale = empty(rows, 1, dtype=torch.float32)
        elif scheme == "fp8_block":
            self.weight_scale = empty(-(-rows // 128), -(-cols // 128), dtype=torch.float32)


class Toy(nn.Module):
    """The last of ``ranks``: rows of gate_proj and up_proj, fused; columns of down_proj; a norm.

    ``down`` says how down_proj is loaded: as it should be, or wrong in some way.
    """

    def __init__(self, scheme="fp8_channel", ranks=1, down="right", quantized=("gate_up_proj", "down_proj")):
        super().__init__()
        self.rank, self.ranks, self.down = ranks - 1, ranks, down
        self.gate_up_proj = Layer(512 // ranks, 256, scheme if "gate_up_proj" in quantized else None, parts=2)
        self.down_proj = Layer(256, 256 // ranks, scheme if "down_proj" in quantized else None)
        self.norm = empty(256)

    def load_weights(self, weights):
        parameters = dict(self.named_parameters())
        for name, weight in weights:
            layer, _, kind = name.rpartition(".")
            if name == "norm":
                self.norm.data.copy_(weight)
            elif layer in ("gate_proj", "up_proj"):
                target = parameters[f"gate_up_proj.{kind}"].data
                if kind == "weight_shape":
                    target.copy_(weight)
                    continue
                if kind == "weight_global_scale":
                    target[int(layer == "up_proj")].copy_(weight[0])
                    continue
                rows = target.shape[0] // 2
                mine = weight.narrow(0, self.rank * rows, rows) if len(weight) > rows else weight
                target.narrow(0, rows * (layer == "up_proj"), rows).copy_(mine)
            elif layer == "down_proj":
                self.load_down(kind, weight, parameters[f"down_proj.{kind}"].data)
            elif layer != "extra":
                raise KeyError(name)

    def load_down(self, kind, weight, target):
        if self.down == "passed over":
            return
        if self.down == "halved":
            weight, target = weight[:128], target[:128]
        scale = kind == "weight_scale"
        if self.down == "no scales" and scale:
            return
        if self.down == "hoarded" and scale:
            raise KeyError("down_proj.weight_scale")
        if self.down == "refused" and scale:
            raise ValueError("what is this?")
        if self.down == "permuted" and not scale:
            weight = weight.view(2, 128, 256).flip(0).reshape(256, 256)
        if self.down == "shifted" and scale:  # the scales of other rows
            target.narrow(0, 0, 128).copy_(weight.narrow(0, 128, 128))
            target.narrow(0, 128, 128).copy_(weight.narrow(0, 0, 128))
            return
        if weight.ndim > 1 and weight.shape[1] > target.shape[1]:
            weight = weight.narrow(1, self.rank * target.shape[1], target.shape[1])
        target.copy_(weight)


class Experts(nn.Module):
    """Gate and up of all experts in one parameter, as vLLM's fused layers have them."""

    def __init__(self, scheme, experts=3, halves=2):
        super().__init__()
        rows, height = {"fp8_channel": 1, "fp8_block": 128}[scheme], 256 * halves
        self.halves = halves
        self.w13 = nn.Parameter(torch.empty(experts, height, 256, dtype=FP8), requires_grad=False)
        self.w13_scale = nn.Parameter(torch.empty(experts, height // rows, -(-256 // 128) if rows > 1 else 1))

    def load_weights(self, weights):
        for name, weight in weights:
            expert, half, kind = name.split(".")
            target = self.w13.data if kind == "weight" else self.w13_scale.data
            rows = target.shape[1] // self.halves
            target[int(expert)].narrow(0, rows * (half == "up_proj"), rows).copy_(weight)


class Stacked(nn.Module):
    """A layer whose loader takes matrices of experts by the names that it is made with, or none."""

    def __init__(self, scheme="fp8_channel", names=("gate_proj", "up_proj", "down_proj")):
        super().__init__()
        self.names = names
        self.gate_up, self.down = Experts(scheme), Experts(scheme, halves=1)

    def load_weights(self, weights):
        for name, weight in weights:
            if name in ("experts.gate_up_proj", "experts.down_proj"):
                (self.down if "down" in name else self.gate_up).w13.data.copy_(weight)
                continue
            _, expert, leaf, kind = name.split(".")
            half = ("gate_proj", "up_proj", "down_proj")[self.names.index(leaf)]
            (self.down if "down" in half else self.gate_up).load_weights([(f"{expert}.{half}.{kind}", weight)])


def stacks_of(matrices, transposed=False):
    """``experts.N.gate_proj.weight``, ... as files have them that stack the experts."""
    found = {}
    for half in ("gate", "up", "down"):
        found[half] = torch.stack([tensor for name, tensor in matrices.items() if f".{half}_proj." in name])
    stacks = {"experts.gate_up_proj": torch.cat([found["gate"], found["up"]], 1), "experts.down_proj": found["down"]}
    return {name: stack.transpose(1, 2) if transposed else stack for name, stack in stacks.items()}
