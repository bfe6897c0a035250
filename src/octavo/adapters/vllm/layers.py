"""Patterns of ``ignore`` that are about vLLM's layers, by names that vLLM has: ``*.qkv_proj``, ``*.mlp.experts``.

They are those that match no tensor of the checkpoint. A layer stays as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ...errors import RecipeError, raise_problems
from ...planning.recipe import matching, nearest


class LayerPatterns:
    """Patterns that are yet to match, while a model is made."""

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self.patterns = tuple(patterns)
        self._matched: set[str] = set()

    def matching(self, layer: str) -> str | None:
        """The first pattern that matches a layer."""
        found = matching(self.patterns, [f"{layer}.weight"]) if self.patterns else ()
        self._matched.update(found)
        return found[0] if found else None

    def check(
        self, layers: Collection[str], parameters: Collection[str], tensors: Collection[str], source: str
    ) -> None:
        """Refuse patterns that have matched no layer.

        Args:
            layers: all that were made.
            parameters: theirs, below the same names.
            tensors: of the checkpoint at ``source``.
        """
        problems = []
        for pattern in self.patterns:
            if pattern in self._matched:
                continue
            if part := next((name for name in parameters if matching([pattern], [name])), None):
                layer = part.rpartition(".")[0]
                problems.append(f"{pattern!r} matches {part}, a part of {layer}, which stays as a whole: ignore that")
                continue
            near = [
                f"the nearest {what} is {name!r}"
                for what, names in (("tensor", tensors), ("layer", layers))
                if (name := nearest(pattern, names))
            ]
            said = f"; {', '.join(near)}" if near else ""
            problems.append(f"{pattern!r} matches no tensor of {source} and no layer of vLLM's{said}")
        raise_problems(RecipeError, "ignore", problems)
