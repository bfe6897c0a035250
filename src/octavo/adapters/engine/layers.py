"""Patterns of ``ignore`` that are about an engine's layers, by names that it has: ``*.qkv_proj``, ``*.mlp.experts``.

They are those that match no tensor of the checkpoint. A layer stays as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

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

    @property
    def unmatched(self) -> list[str]:
        return [pattern for pattern in self.patterns if pattern not in self._matched]

    def check(
        self,
        model: nn.Module,
        paths: Mapping[str, str],
        tensors: Collection[str],
        cut: Callable[[], Mapping[str, str]],
        source: str,
    ) -> None:
        """Refuse patterns that have matched no layer.

        Args:
            paths: the place of each layer in the model -> its name.
            tensors: of the checkpoint at ``source``.
            cut: gives the matrices that stacks of experts are cut into, by all names -> all experts of the layer.
        """
        layers, matrices = [*paths.values()], cut()
        parameters = [
            f"{layer}.{name}"
            for path, layer in paths.items()
            for name, _ in model.get_submodule(path).named_parameters(recurse=False)
        ]
        problems = []
        for pattern in self.unmatched:
            if said := self._near_miss(pattern, parameters, matrices, layers):
                problems.append(f"{pattern!r} matches {said}")
                continue
            near = [
                f"the nearest {what} is {name!r}"
                for what, names in (("tensor", tensors), ("layer", layers))
                if (name := nearest(pattern, names))
            ]
            beside = f"; {', '.join(near)}" if near else ""
            problems.append(f"{pattern!r} matches no tensor of {source} and no layer of {self._engine}'s{beside}")
        raise_problems(RecipeError, "ignore", problems)

    @staticmethod
    def _near_miss(
        pattern: str, parameters: Iterable[str], matrices: Mapping[str, str], layers: Iterable[str]
    ) -> str | None:
        """What a pattern matches that can't be ignored, and what to do."""

        def first(names: Iterable[str]) -> str | None:
            return next((name for name in names if matching([pattern], [name])), None)

        if part := first(parameters):
            return f"{part}, a part of {part.rpartition('.')[0]}, which stays as a whole: ignore that"
        if matrix := first(matrices):
            return f"{matrix}, one expert's, of which all in a layer stay or none: ignore {matrices[matrix]}"
        if bare := first(f"{name}.weight" for name in layers):
            return f"{bare.removesuffix('.weight')}, which has no weights that become FP8: leave it out"
        return None
