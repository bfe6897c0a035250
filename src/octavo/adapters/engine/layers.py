"""Patterns of ``ignore`` that are about an engine's layers, by names that it has: ``*.qkv_proj``, ``*.mlp.experts``.

They are those that match no tensor of the checkpoint. A layer stays as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from ...errors import RecipeError, raise_problems
from ...planning.recipe import matching, nearest


class LayerPatterns:
    """Patterns that are yet to match, while a model is made."""

    def __init__(self, engine: str, patterns: Iterable[str] = ()) -> None:
        self._engine = engine
        self.patterns = tuple(patterns)
        self._matched: set[str] = set()

    def matching(self, layer: str) -> str | None:
        """The first pattern that matches a layer."""
        found = matching(self.patterns, [f"{layer}.weight"]) if self.patterns else ()
        self._matched.update(found)
        return found[0] if found else None

    def check(self, model: nn.Module, paths: Mapping[str, str], tensors: Collection[str], source: str) -> None:
        """Refuse patterns that have matched no layer.

        Args:
            paths: the place of each layer in the model -> its name.
            tensors: of the checkpoint at ``source``.
        """
        layers = [*paths.values()]
        parameters = [
            f"{layer}.{name}"
            for path, layer in paths.items()
            for name, _ in model.get_submodule(path).named_parameters(recurse=False)
        ]
        problems = []
        for pattern in self.patterns:
            if pattern in self._matched:
                continue
            if part := next((name for name in parameters if matching([pattern], [name])), None):
                layer = part.rpartition(".")[0]
                problems.append(f"{pattern!r} matches {part}, a part of {layer}, which stays as a whole: ignore that")
                continue
            if bare := next((name for name in layers if matching([pattern], [f"{name}.weight"])), None):
                problems.append(f"{pattern!r} matches {bare}, which has no weights that become FP8: leave it out")
                continue
            near = [
                f"the nearest {what} is {name!r}"
                for what, names in (("tensor", tensors), ("layer", layers))
                if (name := nearest(pattern, names))
            ]
            said = f"; {', '.join(near)}" if near else ""
            problems.append(f"{pattern!r} matches no tensor of {source} and no layer of {self._engine}'s{said}")
        raise_problems(RecipeError, "ignore", problems)
