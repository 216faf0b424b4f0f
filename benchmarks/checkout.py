"""Import this first: a checkout runs without being installed, and a Python without the packages is named in one line."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [
    str(ROOT / folder) for folder in (".", "3rd_party/DAX", "example/quantization", "tests/webrtc", "tests")
]

import launch  # noqa: F401  checks the packages
