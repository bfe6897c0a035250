"""Folders are layers: each imports only what stands above it, and nothing imports in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import octavo

ROOT = Path(octavo.__file__).parent
#: from the ground up; a module may import from its own layer and from those before it
LAYERS = (
    ("errors", "text", "choices", "quiet", "_version"),
    ("machine", "memory"),
    ("checkpoint",),
    ("elements",),
    ("numerics",),
    ("planning",),
    ("streaming",),
    ("running",),
    ("conversion",),
    ("session",),
    ("adapters.remembering",),
    ("adapters.engine", "adapters.transformers"),
    ("adapters.sglang", "adapters.vllm"),
    ("readers",),
    ("api", "api_models"),
    ("demo",),
    ("cli", "cli_options", "cli_output", "cli_plan"),
    ("__init__", "__main__", "schemes"),
)


def modules(root: Path) -> dict[str, Path]:
    """Name below the package -> file; a package is called by its own name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path], *, all_of_them: bool) -> Iterator[str]:
    """The modules of the package that a module imports: at the top, or anywhere (but for types alone)."""
    tree = ast.parse(path.read_text())
    package = name.split(".") if path.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            for alias in node.names:
                target = ".".join(part for part in (*base, alias.name) if part)
                while target and target not in known:
                    target = target.rpartition(".")[0]
                yield target or "__init__"
        elif all_of_them or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)


def layer_of(name: str) -> int:
    """The number of a module's layer."""
    for number, layer in enumerate(LAYERS):
        if any(name == entry or name.startswith(f"{entry}.") for entry in layer):
            return number
    raise AssertionError(f"{name} is in no layer: give it one in {__file__}")


def wrong_ways(root: Path) -> list[str]:
    known = modules(root)
    return [
        f"{name} imports {target}"
        for name, path in known.items()
        if name != "adapters"
        for target in imports(name, path, known, all_of_them=True)
        if target != "adapters" and target != "__init__" and layer_of(target) > layer_of(name)
    ]


def circles(root: Path) -> list[list[str]]:
    """Modules that import each other, at the top of their files, directly or by way of others."""
    known = modules(root)
    edges = {n: set(imports(n, p, known, all_of_them=False)) - {n} for n, p in known.items()}

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in edges[waiting.pop()] - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    reach = {name: reachable(name) for name in known}
    return sorted({tuple(sorted(m for m in reach[n] if n in reach[m])) for n in known if n in reach[n]})


def test_each_module_imports_only_from_its_layer_and_those_above_it():
    assert wrong_ways(ROOT) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(ROOT) == []


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / "octavo"
    (root / "numerics").mkdir(parents=True)
    (root / "numerics" / "__init__.py").touch()
    (root / "numerics" / "schemes.py").write_text("def get():\n    return 1\n")
    (root / "streaming").mkdir()
    (root / "streaming" / "__init__.py").touch()
    (root / "streaming" / "stream.py").write_text("from ..numerics import schemes\n")
    (root / "__init__.py").touch()
    return root


def test_an_import_that_runs_the_wrong_way_is_found(package):
    assert wrong_ways(package) == []
    (package / "numerics" / "schemes.py").write_text("def get():\n    from ..streaming.stream import Stream\n")
    assert wrong_ways(package) == ["numerics.schemes imports streaming.stream"]


def test_a_circle_is_found(package):
    assert circles(package) == []
    (package / "numerics" / "schemes.py").write_text("from ..streaming.stream import Stream\n")
    assert circles(package) == [("numerics.schemes", "streaming.stream")]
