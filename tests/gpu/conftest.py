"""What tests on accelerators share: engines that remember nothing of the user's."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_plans(plans_of_tests: None) -> None:
    """For all tests of engines."""
