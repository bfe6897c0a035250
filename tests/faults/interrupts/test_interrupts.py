"""A conversion disturbed at random moments; `make faults` disturbs hundreds, in more ways."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from _interrupts import chosen, summary
from _trials import INTERRUPTS, KILLS, Trial, make_place, run_trial, skipped

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is open is asked of /proc"),
]


def test_the_same_call_after_five_interrupts_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "disturbed").mkdir()
    place = make_place(tmp_path / "disturbed")
    trial = run_trial("Ctrl-C at a prompt, five times", 1, place, tmp_path / "trial")
    assert trial.problems == []
    assert trial.runs


def test_a_campaign_has_a_trial_of_each_way_for_each_seed() -> None:
    drawn = [mode for mode, _ in chosen(2 * len(KILLS), 2 * len(INTERRUPTS), seed=0)]
    possible = [mode for mode in (*KILLS, *INTERRUPTS) if skipped(mode) is None]
    assert {*drawn} == {*possible}
    trial = Trial("killed", 3, runs=2, interrupted=1)
    assert summary([trial])["modes"] == {"killed": {"trials": 1, "right": 1, "runs": 2, "disturbed": 1}}
