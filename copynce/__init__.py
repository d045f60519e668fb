"""Image copy detection with PixTrace and CopyNCE.

`load_model` and `Index` are loaded with all that they need when they are first used.
"""

__version__ = "0.1.0"

_LAZY = {"Index": "copynce.index.index", "Model": "copynce.model", "load_model": "copynce.model"}

__all__ = [*_LAZY, "__version__"]


def __getattr__(name: str) -> object:
    # By hand: copynce.pixtrace works where lazy_loader is not installed.
    if name not in _LAZY:
        raise AttributeError(f"module 'copynce' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
