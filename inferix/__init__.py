"""Block-by-block video generation with causal Wan 2.1 models: CausVid and Self-Forcing."""

from inferix.config import ParallelConfig
from inferix.errors import InputError
from inferix.pipelines.causvid import CausVidPipeline
from inferix.pipelines.self_forcing import SelfForcingPipeline

__all__ = ["CausVidPipeline", "InputError", "ParallelConfig", "SelfForcingPipeline"]
