"""Early exits for decoder-only Hugging Face models: train them, calibrate them, generate through them.

Each name is imported when it is first asked for, so that `import adaptive` itself loads neither torch nor transformers.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "EarlyExitModel": "model",
    "ExitConfig": "config",
    "ExitPolicy": "policy",
    "Trace": "policy",
    "calibrate": "certify",
    "Certificate": "calibration",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """The public object `name`, imported from its home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module `adaptive` has no attribute `{name}`; it offers {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
