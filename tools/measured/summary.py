"""The summary: README's headline and table, and the page that leads to the others, with what octavo loses."""

from __future__ import annotations

from typing import Any

from .loading import least_over, over_bytes, without_imports
from .products import slowest
from .results import RESULTS, SCHEMES, Result, gib, load, machine, mib, page, seconds, table

_MODEL = "qwen1.5-moe-a2.7b"


def _first(name: str) -> Result:
    return load(name)[0]


def headline() -> str:
    """README's one figure, with its machine."""
    result = _first("load_memory")
    found = result["checkpoints"]["big-stack"]
    mine, usual = least_over(result, "big-stack")
    size = gib(found["octavo"]["fp8_channel"]["final_bytes"])
    facts = result["machine"]
    return (
        f"A model with one stack of experts of 2.15 GB ({gib(found['checkpoint']['bytes'])} GiB in bf16, {size} GiB in "
        f"FP8) loads with **{mine} MiB** over its FP8 size; loading it in bf16 and then quantizing takes {usual:,} MiB "
        f"over ({facts['cores']} CPU cores, {facts['memory_gib']:.0f} GiB)."
    )


def rows() -> list[tuple[str, str, str]]:
    """What was measured, octavo, and what stands beside it: the rows of README's table."""
    result = _first("load_gpu")
    gpu = result["models"][_MODEL]
    loads = gpu["settings"]["tmpfs"]
    mine, peer = loads["octavo-fp8_channel"], loads["transformers-fp8"]
    device = result.runs[mine["run"]]["machine"]["gpu"].split()[1]
    size = f"{gpu['checkpoint']['bytes'] / 1e9:.1f} GB"
    engines = _first("vllm_gpu")["models"][_MODEL]
    served, online = engines["octavo-fp8_channel tp1"], engines["fp8_per_tensor tp1"]
    sglang = _first("sglang_gpu")["models"][_MODEL]
    mine_there, own = sglang["octavo-fp8_channel tp1"], sglang["fp8 tp1"]
    conversion = _first("convert")
    ways = conversion["schemes"]["fp8_channel"]
    source = f"{conversion['checkpoint']['bytes'] / 1e9:.2f} GB"
    update = _first("update_gpu")["models"][_MODEL]["fp8_channel"]["pinned"]

    def loaded(row: dict[str, Any]) -> str:
        return f"{seconds(without_imports(row)['median'])} s, {mib(over_bytes(row) or 0)} MiB over"

    def converted(row: dict[str, Any]) -> str:
        return f"{seconds(row['call_s']['median'])} s, {row['peak_rss_bytes']['median'] / 1e6:,.0f} MB"

    return [
        (
            f"Load {size} to an {device}, imports aside",
            loaded(mine),
            f"transformers' own online FP8: {loaded(peer)}",
        ),
        (
            f"The same in vLLM {served['versions']['vllm'].rpartition('.')[0]}",
            f"{seconds(served['load_s'])} s, {mib(served['over_bytes'])} MiB over",
            f"vLLM's `fp8_per_tensor`: {seconds(online['load_s'])} s, {mib(online['over_bytes'])} MiB over",
        ),
        (
            f"In SGLang {mine_there['versions']['sglang'].rpartition('.')[0]}",
            f"{seconds(mine_there['load_s'])} s, {mib(mine_there['over_bytes'])} MiB over",
            f"SGLang's `fp8`: {seconds(own['load_s'])} s, {mib(own['over_bytes'])} MiB over",
        ),
        (
            "New weights for it in place, from pinned memory",
            f"{seconds(update['update_s']['median'])} s",
            f"copying them alone: {seconds(update['limit_s'])} s",
        ),
        (
            f"Convert {source} on {conversion['machine']['cores']} CPU cores",
            converted(ways["octavo"]),
            f"llm-compressor: {converted(ways['peer'])}",
        ),
    ]


def readme_table() -> str:
    """README's table."""
    return table(("", "octavo `fp8_channel`", "beside it"), rows(), numbers_from=3)


def _two_gpus() -> str:
    result = next(result for result in load("vllm_gpu") if "octavo-fp8_channel tp2" in result["models"][_MODEL])
    rows = result["models"][_MODEL]
    first, second = (
        [rows[f"octavo-fp8_channel tp{count}{start}"]["load_s"] for count in (1, 2)] for start in ("", " again")
    )
    own = [rows[f"fp8_per_tensor tp{count}"]["load_s"] for count in (1, 2)]
    return (
        f"On two GPUs ({result.gpu}) vLLM loads by octavo in {seconds(first[1])} s, {first[1] / first[0]:.2f} of the "
        f"time on one, and in {seconds(second[1])} s at a second start, {second[1] / second[0]:.2f} of it: making the "
        "model and its plan do not get less, and a rank reads two thirds of the bytes, more slowly. vLLM's own "
        "`fp8_per_tensor` "
        f"takes {seconds(own[1])} s, {own[1] / own[0]:.2f} of it. See [Serving with vLLM](serving.md)."
    )


def losses() -> list[str]:
    """Where octavo is slower than something beside it, as sentences."""
    found = []
    cpu = _first("linear_cpu")["ms"]["1"]
    worst = max(cpu[f"octavo {scheme}"] for scheme in SCHEMES)
    found.append(
        f"On a CPU, a product of one row takes {cpu['octavo fp8_channel'] / cpu['bf16']:.1f} (`fp8_channel`) to "
        f"{worst / cpu['bf16']:.1f} times as long as in bf16: FP8 saves memory there, not time. See "
        "[Running](products.md#a-linear-layer-on-a-cpu)."
    )
    products = _first("matmul_gpu")
    times, name, count, scheme = slowest(products, "eager_us")
    graph, graph_name, graph_count, graph_scheme = slowest(products, "graph_us")
    found.append(
        f"On a GPU, products that are launched one by one from Python can be slower than bf16: {times:.2f} times as "
        f"fast at worst (`{scheme}`, {name}, {count} rows). Replayed as a CUDA graph the worst is {graph:.2f} "
        f"(`{graph_scheme}`, {graph_name}, {graph_count} rows). See [Running](products.md#products-on-a-gpu)."
    )
    engines = _first("vllm_gpu")["models"][_MODEL]
    mine, online = engines["octavo-fp8_channel tp1"], engines["fp8_per_tensor tp1"]
    slower = [1 - mine["decode"][n]["tokens_per_s"] / online["decode"][n]["tokens_per_s"] for n in ("1", "32")]
    converted = engines["converted-fp8_channel tp1"]["decode"]
    found.append(
        f"In vLLM, decoding in `fp8_channel` is {min(slower):.0%} to {max(slower):.0%} slower than in vLLM's own "
        f"`fp8_per_tensor`. Those are vLLM's kernels for a scale a row: the converted checkpoint decodes "
        f"{converted['1']['tokens_per_s']:.0f} tokens a second, octavo {mine['decode']['1']['tokens_per_s']:.0f}, "
        f"`fp8_per_tensor` {online['decode']['1']['tokens_per_s']:.0f}. See [Serving with vLLM](serving.md)."
    )
    found.append(_two_gpus())
    loads = _first("load_gpu")["models"][_MODEL]["settings"]["tmpfs"]
    reader = without_imports(loads["instanttensor"])["median"]
    load_s = without_imports(loads["octavo-fp8_channel"])["median"]
    found.append(
        f"InstantTensor reads the same files, without quantizing them, in {seconds(reader)} s, where octavo's load "
        f"takes {seconds(load_s)} s. See [Loading](loading.md#to-a-gpu)."
    )
    update = _first("update_gpu")["models"][_MODEL]["fp8_channel"]
    found.append(
        f"An update from weights that are on the device takes {seconds(update['device']['update_s']['median'])} s, "
        f"{update['device']['over_limit']:.0f} times what reading them once would: the host's launches are the limit. "
        "See [Updating](updating.md)."
    )
    kept: dict[str, list[bool]] = {}
    for content in _first("load_gpu")["models"].values():
        for rows in content["settings"].values():
            for row in rows.values():
                for aim, held in row.get("promises", {}).items():
                    kept.setdefault(aim, []).append(held)
    missed = [f"*{aim}* by {held.count(False)} of {len(held)}" for aim, held in kept.items() if not all(held)]
    found.append(
        f"Of the aims that loads to an H100 have, some were missed: {', '.join(missed)}. See [Loading](loading.md), "
        "which also says what the words mean."
    )
    return found


def make() -> str:
    """The page."""
    where: dict[str, list[str]] = {}
    for name in sorted({path.stem.partition("-")[0] for path in RESULTS.glob("*.json")}):
        for result in load(name):
            for run in result.runs.values():
                benchmarks = where.setdefault(machine(run["machine"]).partition(", files")[0], [])
                if f"`{result['benchmark']}`" not in benchmarks:
                    benchmarks.append(f"`{result['benchmark']}`")
    return page(
        "Measured",
        """Every figure on these pages is made by a script (`make pages`) from the files in `benchmarks/results`, which
the benchmarks write: none is typed by hand, and what octavo loses is published with the rest. Each table names the
machine, the versions and the commit that it was measured at. The files hold more than the tables: every repetition,
stages, processor time, memory of the host.""",
        headline(),
        readme_table(),
        """| page | answers |
|---|---|
| [Loading](loading.md) | how long, and how much memory, until a checkpoint is a model, beside other loaders |
| [First token](starting.md) | when a process that starts has its first token, and how fast it is from then on |
| [Converting](converting.md) | the same for an FP8 checkpoint on disk, beside llm-compressor |
| [Updating](updating.md) | how fast new weights take the place of old ones; what models that load themselves need |
| [Running](products.md) | how fast the FP8 model computes, on a GPU and on a CPU |
| [Serving with vLLM](serving.md) | how long until vLLM serves, how fast, whether the answers are the same |
| [Serving with SGLang](serving-sglang.md) | the same for SGLang, but its speed |
| [Model types](models.md) | which of transformers' models are loaded and converted rightly, and which are not |
| [Quality](quality.md) | how far answers are from the original's, by scheme and by peer |
| [What becomes FP8](shares.md) | which share of the matrices of full-size models, loaded and converted |
| [Models in vLLM](vllm-models.md) | the same of vLLM's architectures, and what each refusal comes from |""",
        "## Where octavo loses\n\n" + "\n".join(f"- {loss}" for loss in losses()),
        """## What was not measured

More than two GPUs at once; speeds in SGLang; accelerators that are not NVIDIA's;
checkpoints with trained weights (random ones of the same shapes stand in for them); disks faster than that of the cold
loads. The [log of experiments](../log.md) has what was tried by hand, with the failures.""",
        "## Machines\n\n"
        + table(("machine", "benchmarks"), [(name, ", ".join(found)) for name, found in where.items()], numbers_from=2),
    )
