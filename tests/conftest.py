"""What all tests share: `helpers` on the path, hypothesis settings, the command line, and that nothing is left."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

from octavo.machine import cache_root

if TYPE_CHECKING:
    from helpers.command import Run

os.environ["COLUMNS"] = "140"  # tables are as wide as the terminal
# a shell that starts the tests in the background has them ignore Ctrl-C, and with them all that they interrupt
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# tests run beside each other: torch's own threads would wait for one another, far longer than they work; here, and in
# the processes that tests start
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))
# workers of xdist inherit what the first process has set
USERS_CACHE = Path(os.environ.setdefault("OCTAVO_TESTS_USERS_CACHE", str(cache_root())))
# a test plans anew, unless it says otherwise, and keeps nothing in the user's folder; so it is in processes of tests
os.environ["OCTAVO_CACHE"] = os.devnull
# an assert in a shared helper tells what it compared, as one in a test does
pytest.register_assert_rewrite("helpers", "_cases", "_conversions", "_inputs", "_layerwise", "_models", "_sources")

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
def users_cache() -> Path:
    """Where what users keep is, which tests may use if it is no plan."""
    return USERS_CACHE


@pytest.fixture(scope="session")
def plans_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Plans are remembered in a folder of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run the command as its entry point does, in this process; whatever it prints is caught at the descriptors."""
    from helpers.command import Ended
    from octavo import cli

    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["octavo", *map(str, args)])
        capfd.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return Ended(code, out, err)

    return call
