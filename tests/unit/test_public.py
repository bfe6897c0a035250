"""Promises to users: the public names, what importing them loads, and the texts of errors."""

from __future__ import annotations

import ast
import importlib
import inspect
import pickle
import re
import subprocess
import sys
import textwrap
import typing
from pathlib import Path

import pytest

import octavo
from octavo import errors
from octavo.errors import CoverageError, MissingExtraError, OctavoError, raise_problems

FUNCTIONS = ("convert", "layerwise", "load", "plan", "stream", "update", "verify")


def test_all_public_names_are_listed_and_no_others_are_visible():
    assert octavo.__all__ == sorted(octavo.__all__, key=lambda name: (not name[0].isupper(), name))
    assert dir(octavo) == sorted(octavo.__all__)
    assert len(octavo.__all__) <= 10


def test_every_public_name_resolves():
    pytest.importorskip("transformers")
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'octavo' has no attribute 'quantize_everything'"):
        octavo.quantize_everything  # noqa: B018


def test_the_version_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z.]+\d*)?", octavo.__version__)


def in_a_new_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_octavo_imports_no_other_package():
    code = """
import sys
before = set(sys.modules)
import octavo
dir(octavo), octavo.__version__, octavo.__doc__
found = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(found - {"octavo"} - set(sys.stdlib_module_names)), sorted(n for n in sys.modules if "octavo" in n))
"""
    assert in_a_new_process(code).strip() == "[] ['octavo', 'octavo._version']"


FIRST = (
    "import octavo; assert octavo.load.__module__",
    "from octavo import load; assert load.__module__",
    "from octavo import OctavoError, Recipe, plan; assert Recipe() and plan.__module__",
    "import octavo.cli, octavo; assert octavo.convert.__module__",
    "import octavo; assert octavo.schemes.quantize",
    "from octavo import schemes; assert schemes.quantize",
    "from octavo.schemes import quantize; import octavo; assert octavo.schemes.quantize is quantize",
    "from octavo.errors import OctavoError; import octavo; assert octavo.OctavoError is OctavoError",
    "import octavo; assert octavo.errors.CheckpointError",
    "import octavo.planning.plan, octavo; assert octavo.plan.__module__ and octavo.plan.__name__ == 'plan'",
    f"import pickle; assert pickle.loads({pickle.dumps(octavo.Recipe('fp8_block'))!r}).scheme == 'fp8_block'",
)


def test_any_public_name_may_be_the_first_that_is_asked_for():
    code = f"""
import sys
for code in {FIRST!r}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "octavo"]:
        del sys.modules[name]
    exec(code, {{}})
print("fine")
"""
    assert in_a_new_process(code).strip() == "fine"


def test_editors_and_type_checkers_see_every_public_name_where_it_is_defined():
    tree = ast.parse(Path(octavo.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.name: f"octavo.{node.module}"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert sorted(seen) == sorted(octavo.__all__)
    for name, module in seen.items():
        if name != "OctavoConfig":  # which needs transformers
            assert getattr(octavo, name) is getattr(importlib.import_module(module), name)


def test_a_recipe_survives_pickling():
    recipe = octavo.Recipe("fp8_block", targets={"re:.*experts.*": "mxfp8"}, ignore=["lm_head"])
    assert pickle.loads(pickle.dumps(recipe)) == recipe


def test_importing_octavo_stays_light():
    code = """
import sys, octavo
octavo.Recipe, octavo.plan, octavo.load, octavo.stream, octavo.convert, octavo.verify, octavo.OctavoError
octavo.layerwise, octavo.update
heavy = "transformers vllm matplotlib rich.progress huggingface_hub accelerate compressed_tensors typer torch._dynamo"
print(sorted(name for name in heavy.split() if name in sys.modules))
"""
    assert in_a_new_process(code).strip() == "[]"


def test_no_module_shares_the_name_of_a_public_function():
    """Importing a module binds its name in the package, where it would take the function's place."""
    root = Path(octavo.__file__).parent
    names = {path.stem for path in (*root.glob("*.py"), *(init.parent for init in root.glob("*/__init__.py")))}
    assert names.isdisjoint(octavo.__all__)


def test_the_documented_path_of_schemes_stays():
    from octavo import schemes
    from octavo.numerics import schemes as definition

    assert schemes.quantize is definition.quantize
    assert schemes.SCHEMES is definition.SCHEMES


# -- documentation ----------------------------------------------------------------------------------------------------


def section(docstring: str, name: str) -> str:
    """The indented lines below a heading such as ``Args:``."""
    found = re.search(rf"^{name}:\n((?: .*\n|\n)+)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    return textwrap.dedent(found[1]) if found else ""


@pytest.mark.parametrize("name", [*FUNCTIONS, "Recipe", "OctavoConfig"])
def test_every_argument_is_in_the_signature_and_documented(name):
    if name == "OctavoConfig":
        pytest.importorskip("transformers")
    public = getattr(octavo, name)
    parameters = inspect.signature(public).parameters.values()
    # transformers makes a config of whatever a file holds; what it does not know is an error
    named = [one.name for one in parameters if name != "OctavoConfig" or one.kind != one.VAR_KEYWORD]
    assert not [one for one in parameters if one.name in named and one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    assert re.findall(r"^(\w+): \S", section(public.__doc__, "Args"), re.MULTILINE) == named


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_has_a_type_that_can_be_asked_for(name):
    hints = typing.get_type_hints(getattr(octavo, name))
    assert set(hints) == {*inspect.signature(getattr(octavo, name)).parameters, "return"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_are_documented_by_their_names_and_an_example_is_given(name):
    docstring = getattr(octavo, name).__doc__
    raised = re.findall(r"^(\w+): \S", section(docstring, "Raises"), re.MULTILINE)
    assert raised
    assert all(issubclass(getattr(errors, each), OctavoError) for each in raised)
    assert f"octavo.{name}(" in section(docstring, "Examples")


# -- errors -----------------------------------------------------------------------------------------------------------


def test_the_hierarchy_is_as_drawn_in_the_docstring():
    drawn = {}
    stack: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^([ │├└─]*)(\w+Error)\b", line)
        if match:
            depth = len(match[1])
            while stack and stack[-1][0] >= depth:
                stack.pop()
            drawn[match[2]] = stack[-1][1] if stack else "Exception"
            stack.append((depth, match[2]))
    real = {
        name: found.__base__.__name__
        for name, found in vars(errors).items()
        if isinstance(found, type) and issubclass(found, OctavoError)
    }
    assert drawn == real


def test_one_problem_is_one_line():
    with pytest.raises(CoverageError, match=r"^here: it is missing$"):
        raise_problems(CoverageError, "here", ["it is missing"])


def test_several_problems_are_a_list_with_advice_below():
    with pytest.raises(CoverageError) as caught:
        raise_problems(CoverageError, "here", ["one", "two"], "Do this.")
    assert str(caught.value) == "here: 2 problems\n  - one\n  - two\nDo this."


def test_many_problems_are_cut_off_and_counted():
    with pytest.raises(CoverageError) as caught:
        raise_problems(CoverageError, "here", [str(i) for i in range(120)])
    lines = str(caught.value).splitlines()
    assert lines[0] == "here: 120 problems"
    assert lines[50:] == ["  - 49", "  - ... and 70 more"]


def test_no_problem_is_no_error():
    raise_problems(CoverageError, "here", [])


def test_a_missing_extra_names_the_command_that_installs_it():
    error = MissingExtraError("plot", "drawing a report")
    assert str(error) == "drawing a report needs packages that are not installed: pip install 'octavo[plot]'"
    assert error.extra == "plot"


def test_every_extra_that_is_named_exists():
    tomllib = pytest.importorskip("tomllib")
    from pathlib import Path

    root = Path(__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set()
    for file in (root / "src" / "octavo").rglob("*.py"):
        named |= set(re.findall(r"MissingExtraError\(\s*\"(\w+)\"", file.read_text()))
    assert named
    assert named <= set(extras)


def test_without_transformers_nothing_is_fetched_or_read(monkeypatch):
    from octavo.adapters.transformers import load as adapter

    def refuse(*_args, **_options):
        raise AssertionError("was opened")

    monkeypatch.setattr(adapter, "find_spec", lambda name: None)
    monkeypatch.setattr(adapter.Checkpoint, "open", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'octavo\[transformers\]'"):
        octavo.load("org/name")
