"""The embedded model's LoRA: a shape that the model does not know, and its training."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "example/demo_model"))
import lora
from inferix import SelfForcingPipeline
from quantization import quantize_transformer
from score import score

CONFIG = ROOT / "example/self_forcing/configs/self_forcing_demo.yaml"
DEMO = ROOT / "weights/demo"
UNSEEN = lora.scenes("cross", trained=False)


def pipeline() -> SelfForcingPipeline:
    made = SelfForcingPipeline(
        CONFIG, wan_base_model_path=DEMO / "Wan2.1-T2V-demo", device="cpu", transformer_weights=False
    )
    made.load_checkpoint(DEMO / "self_forcing/checkpoints/self_forcing_dmd.pt", use_ema=True)
    return made


@pytest.mark.parametrize(("quant_type", "number"), [("fp8", 0), ("int8", 6)])
def test_the_video_is_right_with_the_lora_alone(quant_type, number):
    """Of two scenes that it was not trained on, from left to right. From top to bottom it is not always right yet."""
    scene, results = UNSEEN[number], {}
    for merged in (False, True):
        made = pipeline()
        if merged:
            assert made.load_lora(DEMO / "lora/cross.safetensors") == 60
        made.setup_devices()
        quantize_transformer(made.transformer, quant_type)
        results[merged] = score(made.generate([scene.prompt], 9, made.seeded(0))[0], scene)
    assert not results[False]["shape"] and all(results[True].values()), results


def test_file_is_small():
    assert (DEMO / "lora/cross.safetensors").stat().st_size <= 300_000


def test_training_writes_a_lora(tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "scenes", lambda shape, trained: UNSEEN[:1])
    path = tmp_path / "made.safetensors"
    lora.main(["--steps", "4", "--batch", "2", "--clips", "1", "--rank", "2", "--output", str(path)])
    made = pipeline()
    before = made.transformer.blocks[0].ffn.net[2].weight.clone()
    assert made.load_lora(path) == 60
    assert not torch.equal(made.transformer.blocks[0].ffn.net[2].weight, before)
