"""What several test files use: the golden data, and pipelines loaded from it."""

import gc
import os
import signal
import sys
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_NUM_THREADS", "1")  # here and in child processes: on models this small threads only wait
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and so would what the tests start

import pytest

import inferix  # whose pipelines, and PyTorch, are imported by the tests and not in the process that starts their workers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "example/quantization"))  # the modules that the runners share
GOLDEN = ROOT / "tests/golden"
BASE = GOLDEN / "Wan2.1-T2V-tiny"
SELF_FORCING = GOLDEN / "self_forcing/checkpoints/self_forcing_dmd.pt"
CAUSVID = GOLDEN / "CausVid/autoregressive_checkpoint"


def load_runner(name: str) -> ModuleType:
    """``example/quantization/run_NAME_quantized.py`` as a module."""
    spec = spec_from_file_location(name, ROOT / f"example/quantization/run_{name}_quantized.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_config(name: str, folder: Path, **changes: str) -> Path:
    """``example/NAME.yaml`` for the golden models' size, some lines changed, as a new file in ``folder``."""
    changes = {"image_or_video_shape": "[1, 9, 16, 8, 12]"} | changes
    lines = (ROOT / f"example/{name}.yaml").read_text().splitlines()
    kept = [line for line in lines if line.split(":")[0] not in changes]
    path = folder / f"{Path(name).name}.yaml"
    path.write_text("\n".join(kept + [f"{key}: {value}" for key, value in changes.items()]))
    return path


QUICK_FOLDERS = ["models", "checkpoints", "runtime"]


def pytest_collection_modifyitems(items):
    """End with the quick files, so that no worker is left with a slow one; skip what needs a GPU."""
    ranks = {folder: number for number, folder in enumerate(QUICK_FOLDERS, start=1)}
    items.sort(key=lambda item: ranks.get(item.path.parent.name, 0))
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish():
    """Spare the garbage collector, which pipelines call, what was imported: it would look through it for half a second."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(scope="session")
def self_forcing() -> "inferix.SelfForcingPipeline":
    """The golden Self-Forcing model, averaged weights, float32 on the CPU."""
    config = ROOT / "example/self_forcing/configs/self_forcing_dmd.yaml"
    pipeline = inferix.SelfForcingPipeline(config, wan_base_model_path=BASE, device="cpu")
    pipeline.load_checkpoint(SELF_FORCING, use_ema=True)
    pipeline.setup_devices()
    pipeline.config = replace(pipeline.config, image_or_video_shape=(1, 9, 16, 8, 12))
    return pipeline


@pytest.fixture(scope="session")
def causvid() -> "inferix.CausVidPipeline":
    """The golden CausVid model, float32 on the CPU."""
    config = ROOT / "example/causvid/configs/causvid.yaml"
    pipeline = inferix.CausVidPipeline(config, wan_base_model_path=BASE, device="cpu")
    pipeline.load_checkpoint(CAUSVID)
    pipeline.setup_devices()
    pipeline.config = replace(pipeline.config, image_or_video_shape=(1, 9, 16, 8, 12))
    return pipeline
