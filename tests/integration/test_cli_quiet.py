"""What other libraries log or warn of does not reach the screen of a command; errors do, and all is as before."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from helpers.command import Run
from octavo.quiet import others_quiet


def talk() -> None:
    """What libraries do when they are imported or used."""
    logging.getLogger("chatty").warning("Failed to load a library that nobody asked for")
    logging.getLogger("chatty").error("this is serious")
    warnings.warn_explicit("use that instead", FutureWarning, "chatty.py", 1, module="chatty.inner")
    warnings.warn_explicit("of our own", UserWarning, "octavo.py", 1, module="octavo.plan")


@pytest.fixture
def _default_warnings(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Warnings as Python shows them to users, who ask for nothing."""
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


@pytest.mark.usefixtures("_default_warnings")
def test_only_errors_and_our_own_warnings_are_heard(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as caught, others_quiet():
        talk()
    assert [record.getMessage() for record in caplog.records] == ["this is serious"]
    assert [str(warning.message) for warning in caught] == ["of our own"]


@pytest.mark.usefixtures("_default_warnings")
def test_afterwards_others_are_heard_as_before(caplog: pytest.LogCaptureFixture) -> None:
    before = (list(warnings.filters), logging.root.manager.disable)
    with pytest.raises(KeyError), others_quiet():
        raise KeyError
    assert (list(warnings.filters), logging.root.manager.disable) == before
    with warnings.catch_warnings(record=True) as caught:
        talk()
    assert (len(caplog.records), len(caught)) == (2, 2)


def test_who_asks_python_for_warnings_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        with others_quiet():
            talk()
    assert len(caught) == 2


@pytest.mark.parametrize("command", [["plan"], ["generate", "-p", "hm", "-n", 1]])
@pytest.mark.usefixtures("_default_warnings")
def test_a_command_lets_libraries_talk_to_themselves(
    command: list[Any], llama: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from octavo.adapters.transformers import load

    prepare = load.prepare

    def noisy(*args: Any, **options: Any) -> Any:
        logging.getLogger("chatty").warning("Failed to load a library that nobody asked for")
        warnings.warn_explicit("use that instead", FutureWarning, "chatty.py", 1, module="chatty")
        return prepare(*args, **options)

    monkeypatch.setattr(load, "prepare", noisy)
    stderr = logging.StreamHandler()  # as transformers has one
    logging.getLogger("chatty").addHandler(stderr)
    try:
        ended = run(command[0], llama, *command[1:])
    finally:
        logging.getLogger("chatty").removeHandler(stderr)
    assert (ended.code, ended.err) == (0, "")
