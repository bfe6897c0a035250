"""Reference kernels."""


def register() -> None:
    pass
