"""Kernels that are compiled before a forward asks for them, in threads, while a load waits for its files.

Which they are, the functions of `fp8` say themselves: on tensors of meta they compute nothing, and each launch is noted
here as wanted, once for all that share a binary. A forward that needs one of these waits for it if it is being
compiled, and otherwise compiles it itself, as ever. Whatever fails here is left to the forward to meet, and to tell.

Compiled is what Triton keeps on disk, and nothing is loaded to a device: that would disturb whoever captures a graph.
The threads end with what is wanted, with the main thread, or with the load, if that fails; Python waits for the one
kernel on which each is at work.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..machine import usable_cpus
from ..numerics import schemes
from . import fp8
from .modules import QuantizedExperts, QuantizedLinear, scale_name

#: numbers of rows, of tokens or of their experts: some prompts' first, then a token's
_ROWS = (32, 256, 1, 2048, 33, 384, *(1 << i for i in range(14) if 1 << i not in (32, 256, 1, 2048)))
#: half of a thread's time is Python's, which one thread at a time runs
_MOST_THREADS = 3


class Job:
    """A kernel to compile, by the thread that comes first."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._lock = threading.Lock()
        self.error: Exception | None = None

    def run(self) -> None:
        """Compile it, unless somebody else has or does."""
        with self._lock:
            work, self._work = self._work, None
            try:
                if work is not None:
                    work()
            except Exception as error:  # the forward will meet it, and tell
                self.error = error

    def claim(self) -> None:
        """Wait for whoever is compiling it; after that nobody will."""
        with self._lock:
            self._work = None


#: signature of a launch -> its job
wanted: dict[Any, Job] = {}
_noting = threading.local()  # ``jobs``: where the wants of this thread go


def want(signature: Any, work: Callable[[], None]) -> None:
    """Note that a kernel is wanted, which ``work`` compiles, if this thread is here to find out."""
    jobs: deque[Job] | None = getattr(_noting, "jobs", None)
    if jobs is not None and signature not in wanted:
        wanted[signature] = job = Job(work)
        jobs.append(job)


def settle(signature: Any) -> None:
    """Wait for a kernel that is being compiled; one that only waits is the caller's from now on."""
    job = wanted.get(signature)
    if job is not None:
        job.claim()


@dataclass(frozen=True)
class Product:
    """A product with a quantized weight: all that decides about its kernels but the number of rows."""

    shape: tuple[int, ...]  # [out, in] or [experts, out, in], as it is stored
    scheme: str
    parts: tuple[int, ...]
    bias: torch.dtype | None
    scale: tuple[tuple[int, ...], torch.dtype]

    @property
    def cols(self) -> int:
        """Those of the weight, and of activations."""
        return schemes.get(self.scheme).weight_shape(self.shape)[-1]

    def operands(self) -> tuple[Tensor, Tensor, str, tuple[int, ...], Tensor | None]:
        """Weight, scale, scheme, parts and bias."""
        weight, scale = _meta(self.shape, schemes.get(self.scheme).dtype), _meta(*self.scale)
        bias = None if self.bias is None else _meta(self.shape[:-1], self.bias)
        return weight, scale, self.scheme, self.parts, bias


@dataclass(frozen=True)
class Linear:
    """A linear layer's product, for activations of a dtype."""

    product: Product
    dtype: torch.dtype

    def rehearse(self, rows: int) -> None:
        fp8.linear(_meta((rows, self.product.cols), self.dtype), *self.product.operands())


@dataclass(frozen=True)
class Experts:
    """Both products of a stack of experts, and what is around them."""

    up: Product
    down: Product
    dtype: torch.dtype

    def rehearse(self, rows: int) -> None:
        """As `QuantizedExperts` computes them, for so many pairs of token and expert: in all, then for each expert."""
        self._rehearse(rows)
        self._rehearse(rows * self.up.shape[0])

    def _rehearse(self, rows: int) -> None:
        """One expert a token stands for any number."""
        experts = self.up.shape[0]
        ids, order, ends, position = _meta((rows,), torch.int64), None, None, None
        pairs = ids.view(rows, 1)
        if not fp8.use_pairs(rows):
            ids, order, ends, position = fp8.sort_routes(ids, experts)
        for product, gather in ((self.up, True), (self.down, False)):
            x = _meta((rows, product.cols), self.dtype)
            y = fp8.expert_linear(x, *product.operands(), ids, order, ends, 1, gather)
        for dtype in (self.dtype, torch.float32):  # the router of the model has its own opinion
            fp8.combine(y, pairs, _meta((rows, 1), dtype), experts, position)


def products_of(model: nn.Module) -> list[Linear | Experts]:
    """What a forward of a model computes with quantized weights, in half precision; its modules have these already."""
    linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    found: dict[Linear | Experts, None] = {}  # in the order of the model
    for layer in linears:
        product = _product(layer, "weight", (layer.scheme, layer.parts), layer.bias)
        if product is not None:
            found[Linear(product, layer.activation_dtype)] = None
    spoken = itertools.chain((layer.activation_dtype for layer in linears), (p.dtype for p in model.parameters()))
    dtype = next((dtype for dtype in spoken if dtype in fp8.DTYPES), torch.float32)
    for module in model.modules():
        if isinstance(module, QuantizedExperts):
            found.update(dict.fromkeys(_experts(module, dtype)))
    return [each for each in found if each.dtype in fp8.DTYPES]


def _experts(module: Any, dtype: torch.dtype) -> Iterator[Experts]:
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if all(name in module.octavo_stacks for name in names):
        up, down = (_product(module, name, module.octavo_stacks[name], module._bias(name)) for name in names)
        if up is not None and down is not None and fp8.takes_experts([up.parts, down.parts]):
            yield Experts(up, down, dtype)


def _product(module: Any, name: str, how: tuple[str, tuple[int, ...]], bias: Tensor | None) -> Product | None:
    """The product with a weight, if that is quantized."""
    weight, scale = module._parameters[name], module._parameters[scale_name(name)]
    if weight.dtype not in schemes.HELD:
        return None
    return Product(tuple(weight.shape), *how, None if bias is None else bias.dtype, (tuple(scale.shape), scale.dtype))


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# -- threads ----------------------------------------------------------------------------------------------------------


class Ahead:
    """Compiles for a device what a model will launch there: nothing, where that is no GPU with FP8 units.

    Made, it begins with what Triton needs before any kernel. Used as a context, it forgets what is left to do if an
    error ends that.

    Args:
        devices: those to which the model goes. The first GPU stands for all.
    """

    def __init__(self, devices: Iterable[str | torch.device]) -> None:
        self._device = next((found for found in map(torch.device, devices) if found.type == "cuda"), None)
        self._jobs: deque[Job] = deque()
        self._start(_make_ready)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._device = None
            self._jobs.clear()

    def begin(self, model: nn.Module) -> None:
        """Compile what this model needs, from now on."""
        if self._device is not None:
            products = products_of(model)
            self._start(lambda: self._find(products))

    def _start(self, work: Callable[[], None]) -> None:
        if self._device is not None:
            with contextlib.suppress(RuntimeError):  # no more threads here
                threading.Thread(target=self._run, args=(work, self._device), name="octavo-compile").start()

    def _run(self, work: Callable[[], None], device: torch.device) -> None:
        with contextlib.suppress(Exception):
            index = device.index or 0
            if fp8.has_units(index) and fp8.has_kernels():
                with torch.cuda.device(index):
                    work()

    def _find(self, products: Sequence[Linear | Experts]) -> None:
        _make_ready()
        jobs = note(products)
        if self._device is None:
            return
        self._jobs.extend(jobs)
        for _ in range(min(_MOST_THREADS, usable_cpus() // 2, len(jobs)) - 1):
            self._start(self._compile)
        self._compile()

    def _compile(self) -> None:
        while threading.main_thread().is_alive():
            try:
                job = self._jobs.popleft()
            except IndexError:
                return
            job.run()


def note(products: Iterable[Linear | Experts]) -> Sequence[Job]:
    """The kernels that products launch and that nobody has wanted before, the likeliest first."""
    _noting.jobs = jobs = deque[Job]()
    try:
        for rows in _ROWS:
            for product in products:
                with contextlib.suppress(Exception):
                    product.rehearse(rows)
    finally:
        del _noting.jobs
    return jobs


_readying = threading.Lock()


def _make_ready() -> None:
    """Import Triton, and have it read all of itself to know its own version, which takes a third of a second."""
    with _readying:
        _make_ready_once()


@functools.cache
def _make_ready_once() -> None:
    from triton.runtime import cache, driver

    driver.active.utils  # noqa: B018  # compiles a little C, too
    if hasattr(cache, "triton_key"):
        cache.triton_key()
