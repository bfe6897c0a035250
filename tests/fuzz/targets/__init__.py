"""Targets: each takes bytes, gives them to a part of octavo that reads what others wrote, and knows their grammar."""

from __future__ import annotations

from pathlib import Path

from .base import Target
from .configs import Configs
from .digests import Digests
from .headers import Headers
from .indexes import Indexes
from .manifests import Manifests
from .models import Models
from .names import Names
from .neighbours import Neighbours
from .options import Options
from .recipes import Recipes
from .results import Results

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (Headers, Indexes, Names, Configs, Recipes, Options, Manifests, Models, Results, Digests, Neighbours)
}


def make(name: str, folder: Path) -> Target:
    """A target with an empty folder of its own inside ``folder``."""
    place = folder / name
    place.mkdir(parents=True)
    return TARGETS[name](place)


__all__ = ["TARGETS", "Target", "make"]
