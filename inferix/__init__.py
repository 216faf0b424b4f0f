"""Block-by-block video generation with causal Wan 2.1 models: CausVid and Self-Forcing."""

from importlib import import_module
from typing import TYPE_CHECKING

from inferix.errors import InputError

if TYPE_CHECKING:
    from inferix.config import ParallelConfig
    from inferix.pipelines.causvid import CausVidPipeline
    from inferix.pipelines.self_forcing import SelfForcingPipeline

__all__ = ["CausVidPipeline", "InputError", "ParallelConfig", "SelfForcingPipeline"]
__version__ = "0.1.0"

_MODULES = {
    "CausVidPipeline": "inferix.pipelines.causvid",
    "ParallelConfig": "inferix.config",
    "SelfForcingPipeline": "inferix.pipelines.self_forcing",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: PyTorch and diffusers take seconds (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
