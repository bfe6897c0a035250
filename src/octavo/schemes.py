"""The documented name of `octavo.numerics.schemes`, where schemes are defined."""

from __future__ import annotations

from .numerics.schemes import *  # noqa: F403
