"""The oldest transformers that pyproject.toml allows, and the newest that is known, pass the same integration tests.

Makes a virtual environment of its own beside the running one (whose torch, pytest and the rest it shares), installs
that version with the older huggingface_hub that it asks for, and runs ``tests/integration/test_transformers*.py`` in
it. Kept in the cache folder, so that only the first run installs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from octavo.adapters.transformers import versions

OLDEST, NEWEST = "5.17.0", "5.24.0"
REPOSITORY = Path(__file__).resolve().parents[4]
SUITE = sorted((REPOSITORY / "tests" / "integration" / "adapters" / "transformers").glob("test_*.py"))

pytestmark = [pytest.mark.peers, pytest.mark.slow]


def test_oldest_version_is_the_one_that_the_extra_allows() -> None:
    assert f'"transformers>={OLDEST.removesuffix(".0")}"' in (REPOSITORY / "pyproject.toml").read_text()


def test_newest_version_is_the_one_that_nothing_is_said_of() -> None:
    assert ".".join(map(str, (*versions.NEWEST, 0))) == NEWEST


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_integration_tests_pass_with_another_transformers(version: str) -> None:
    python = _environment(version)
    found = _run(python, "-c", "import transformers; print(transformers.__version__)")
    assert found.stdout.strip() == version, found.stdout + found.stderr
    # without plug-ins of the calling run: no xdist workers inside of xdist workers
    result = _run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *SUITE)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def _environment(transformers: str) -> Path:
    """The interpreter of an environment that sees the running one's packages behind its own."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo-tests"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = cache / f"transformers-{transformers}-py{version}"
    python, complete = folder / "bin" / "python", folder / "complete"
    parent = sysconfig.get_path("purelib")
    if complete.is_file() and complete.read_text() == parent:
        return python
    venv.EnvBuilder(with_pip=False, clear=True).create(folder)
    own = folder / "lib" / f"python{version}" / "site-packages"
    # .pth entries come last on sys.path: what is installed here hides what the running environment has
    (own / "octavo_parent.pth").write_text(parent + "\n")
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    result = _run(*pip, "install", "-q", "--disable-pip-version-check", f"transformers=={transformers}")
    if result.returncode:
        pytest.skip(f"transformers {transformers} can't be installed here: {result.stderr[-500:]}")
    complete.write_text(parent)
    return python


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    return subprocess.run(
        [str(part) for part in command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
