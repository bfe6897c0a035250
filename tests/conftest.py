"""What all tests share: `helpers` on the path, hypothesis settings, and a check that nothing is left behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

os.environ["COLUMNS"] = "140"  # tables are as wide as the terminal
# a shell that starts the tests in the background has them ignore Ctrl-C, and with them all that they interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# tests run beside each other: torch's own threads would wait for one another, far longer than they work
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).parent))
# an assert in a shared helper tells what it compared, as one in a test does
pytest.register_assert_rewrite(
    "helpers", "_cases", "_cli", "_conversions", "_inputs", "_layerwise", "_models", "_sources"
)

#: so many times the usual number of examples, for `make properties`
_TIMES = int(os.environ.get("OCTAVO_EXAMPLES", 1))
hypothesis.settings.register_profile(
    "octavo",
    deadline=None,  # other processes share the cores
    max_examples=100 * _TIMES,
    # what is in no commit can't fail one: others are tried while developing, and where many are asked for
    derandomize=bool(os.environ.get("CI")) and _TIMES == 1,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("octavo")


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """Fail a test after which threads of octavo live on, or shards are still open."""
    from helpers import open_shards, threads_of_octavo

    before = open_shards()
    yield
    assert threads_of_octavo() == []
    assert open_shards() == before


@pytest.fixture(scope="session")
def plans_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines remember their plans in a folder of these tests, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
