"""The demo's geometry, made smaller for the benchmarks' tests."""

from dataclasses import replace

from common import Geometry


def small_demo(demo: Geometry) -> Geometry:
    """Return the geometry with two layers and smaller frames."""
    config = replace(demo.config, image_or_video_shape=(1, 21, 16, 8, 8))
    return replace(demo, transformer=replace(demo.transformer, num_layers=2), config=config)
