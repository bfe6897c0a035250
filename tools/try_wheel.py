"""Try the package as it is installed, in an environment that holds nothing else: convert a small checkpoint, verify it.

Run by ``make wheel`` with the interpreter of a fresh environment, in which neither transformers nor this checkout can
be imported.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import octavo


def main() -> None:
    assert "site-packages" in str(octavo.__file__), f"{octavo.__file__} is not the installed package"
    assert importlib.util.find_spec("transformers") is None, "this environment is to hold octavo's own needs alone"
    command = Path(sys.executable).with_name("octavo")
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder, "source"), Path(folder, "made")
        source.mkdir()
        save_file({"layers.0.up_proj.weight": torch.randn(256, 128).bfloat16()}, source / "model.safetensors")
        for arguments in (
            ["--version"],
            ["--help"],
            ["plan", str(source), "--json"],
            ["convert", str(source), str(made)],
            ["verify", str(made), "--against", str(source), "--json"],
        ):
            done = subprocess.run([command, *arguments], capture_output=True, text=True)
            assert done.returncode == 0, f"octavo {' '.join(arguments)}: {done.stdout}{done.stderr}"
        assert json.loads(done.stdout)["ok"], done.stdout
    typed = Path(octavo.__file__).with_name("py.typed")
    assert typed.exists(), "the wheel lacks py.typed: its types would be ignored"
    print(f"octavo {octavo.__version__}, installed from its wheel, converts and verifies")


if __name__ == "__main__":
    main()
