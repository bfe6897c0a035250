"""`octavo demo`: what it shows and returns, on a tiny model; and with the real one, as a new user runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from helpers.command import Run, only_json, refused
from octavo import schemes
from octavo.adapters.transformers.chat import answer, load_tokenizer
from octavo.choices import DEFAULT_SCHEME
from octavo.demo import demo, model

ANSWERS = {
    demo.QUESTION: "The capital city of Japan is Tokyo.",
    demo.NEXT_QUESTION: "The plural of mouse is mice.",
}
# In logits. Where sums are rounded to bf16 in another way, the smallest lead of an answer moves by up to 0.25.
MARGIN = 0.5


# -- on a tiny model --------------------------------------------------------------------------------------------------


@pytest.fixture
def _tiny(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*args: Any, max_new_tokens: int, **options: Any) -> str:
        return answer(*args, max_new_tokens=3, **options)

    monkeypatch.setattr(demo, "prepare", lambda progress: llama)
    monkeypatch.setattr(demo, "EVAL_TEXT", demo.EVAL_TEXT[:64])  # the model here has 128 positions
    monkeypatch.setattr(demo, "answer", short)


def test_the_folder_of_its_picture_is_looked_for_first(tmp_path: Path, run: Run) -> None:
    refused(run("demo", "--plot", tmp_path / "missing" / "a.png"), "does not exist")


@pytest.mark.usefixtures("_tiny")
def test_it_shows_the_curve_answers_and_a_comparison(llama: Path, tmp_path: Path, run: Run) -> None:
    threads = torch.get_num_threads()
    ended = run("demo", "--plot", tmp_path / "curve.png")
    assert (ended.code, ended.err) == (0, "")
    for part in ("the model, unquantized", demo.QUESTION, "bf16", "64 tokens of prose", "KL divergence"):
        assert part in ended.out
    assert f"octavo convert {llama} " in ended.out
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("_tiny")
def test_as_json_it_returns_answers_beside_those_of_bf16(run: Run) -> None:
    found = only_json(run("demo", "--json", "--prompt", "hm", "--scheme", "mxfp8"))
    assert (found["question"], set(found["answers"])) == ("hm", {"bf16", "mxfp8"})
    assert found["comparison"]["kl"] >= 0
    assert found["load"]["quantized"]


@pytest.mark.usefixtures("_tiny")
def test_unquantized_it_answers_as_bf16_does(run: Run) -> None:
    found = only_json(run("demo", "--json", "--scheme", "none"))
    assert found["answers"]["none"] == found["answers"]["bf16"]
    assert found["comparison"]["kl"] == 0


def test_without_a_folder_to_keep_its_model_in_it_says_what_to_do(run: Run) -> None:
    """Plans are switched off by such a folder."""
    pytest.importorskip("gguf")
    assert os.environ["OCTAVO_CACHE"] == os.devnull
    ended = run("demo")
    assert ended.code != 0
    assert (
        "/dev/null: no folder, so that the demo's model (269 MB) has no place. Set OCTAVO_CACHE"
        in ended.err.replace("\n", " ")
    )


# -- with the real one ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2(users_cache: Path) -> Path:
    try:
        return model.prepare(users_cache)
    except octavo.OctavoError as error:
        pytest.skip(f"the demo model can't be had: {error}")


@torch.inference_mode()
def margins(loaded: Any, tokenizer: Any, question: str, expected: str) -> torch.Tensor:
    """By how much each token of the expected answer, and the end after it, leads all others: float32 [tokens]."""
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    asked = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    said = tokenizer(expected + tokenizer.eos_token, return_tensors="pt", add_special_tokens=False)["input_ids"]
    logits = loaded(torch.cat([asked, said[:, :-1]], 1)).logits[0, asked.shape[1] - 1 :].float()
    chosen = said[0, :, None]
    others = logits.scatter(1, chosen, -torch.inf).amax(-1)
    return logits.gather(1, chosen)[:, 0] - others


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [None, *schemes.SCHEMES])
def test_answers_lead_by_far_in_every_scheme(scheme: str | None, smollm2: Path) -> None:
    loaded, tokenizer = octavo.load(smollm2, scheme), load_tokenizer(str(smollm2))

    def smallest() -> dict[str, float]:
        return {q: margins(loaded, tokenizer, q, expected).min().item() for q, expected in ANSWERS.items()}

    in_bf16 = smallest() if scheme == DEFAULT_SCHEME else {}  # which the demo does not compute in
    demo.compute_in_float32(loaded)
    in_float32 = smallest()
    assert min(*in_bf16.values(), *in_float32.values()) >= MARGIN, (in_bf16, in_float32)


def _start(home: Path, smollm2: Path, **more: str) -> subprocess.Popen[str]:
    """`octavo demo` for a user whose home is empty, but for the model."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "COLUMNS")}
    environment |= {"HOME": str(home), "OCTAVO_CACHE": str(smollm2.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    # whoever runs the tests in the background of a shell may have told their processes to ignore Ctrl-C
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from octavo.cli import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "demo"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
        env=environment | more,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)  # other processes share the cores
def test_a_log_holds_plain_lines_of_80_columns_and_nothing_of_other_libraries(tmp_path: Path, smollm2: Path) -> None:
    with _start(tmp_path, smollm2) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "\x1b" not in out
    assert "\r" not in out
    assert [line for line in out.splitlines() if len(line) > 80 and str(smollm2) not in line] == []
    assert out.count(ANSWERS[demo.QUESTION]) == 2, out
    assert sorted(tmp_path.rglob("*")) == []  # it writes nothing but the model


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("after", ["Loading it", "  > "])
def test_ctrl_c_ends_it_cleanly(after: str, tmp_path: Path, smollm2: Path) -> None:
    with _start(tmp_path, smollm2) as process:
        assert process.stdout is not None
        _wait_for(process.stdout, after)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert (process.returncode, err) == (130, "interrupted\n")


def _wait_for(lines: Iterator[str], begin: str) -> None:
    assert any(line.startswith(begin) for line in lines)
