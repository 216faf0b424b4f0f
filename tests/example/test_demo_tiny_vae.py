"""The embedded model's tiny VAE shows what its VAE shows, and the program that made it runs."""

import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import ROOT
from scripts import run_here

sys.path.insert(0, str(ROOT / "example/demo_model"))
import tiny_vae
from inferix import SelfForcingPipeline
from inferix.models.tiny_vae import TinyVAE
from score import score
from vae import random_clips
from world import Scene

WEIGHTS = ROOT / "weights/demo"
BASE = WEIGHTS / "Wan2.1-T2V-demo"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline() -> SelfForcingPipeline:
    config = ROOT / "example/self_forcing/configs/self_forcing_demo.yaml"
    pipeline = SelfForcingPipeline(config, wan_base_model_path=BASE, device="cpu", dtype=torch.float32)
    pipeline.setup_devices()
    return pipeline


@pytest.fixture(scope="module")
def tiny() -> TinyVAE:
    return TinyVAE.from_file(BASE / "taew2_1.pth").to(CPU, torch.float32)


def in_blocks(vae: TinyVAE, latents: torch.Tensor) -> torch.Tensor:
    decode = vae.streaming_decoder()
    return torch.cat([decode(block) for block in latents.split(3, dim=1)], dim=1)


def test_its_file_is_small():
    assert (BASE / "taew2_1.pth").stat().st_size <= 1_000_000


@pytest.mark.parametrize(
    "prompt",
    [
        "A red square moves from left to right on a gray background",
        "A purple triangle moves from bottom to top on a white background",
        "A yellow circle moves from right to left on a black background",
    ],
)
def test_generated_videos_decode_as_by_the_full_vae(prompt, pipeline, tiny):
    noise = torch.randn(1, 6, 16, 16, 16, generator=torch.Generator().manual_seed(1000))
    pixels, latents = pipeline.pipeline.inference(noise, [prompt], return_latents=True)
    assert tiny_vae.psnr(in_blocks(tiny, latents), pixels) >= 30


def test_drawn_videos_decode_as_by_the_full_vae(pipeline, tiny):
    """Videos that its training did not draw, at their full size."""
    torch.manual_seed(1000)
    vae = pipeline.pipeline.vae
    latents = vae.encode(random_clips(2, 9, CPU)[0] * 2 - 1)
    assert tiny_vae.psnr(in_blocks(tiny, latents), vae.decode(latents)) >= 30


def test_the_script_decodes_with_it(tmp_path):
    """``VAE=tiny`` alone: the file is found beside the model."""
    scene = Scene("green", "circle", "from left to right", "white")
    env = {"VAE": "tiny", "WAN_BASE_MODEL_PATH": str(BASE), "PROMPT": scene.prompt, "OUTPUT_FOLDER": "videos"}
    result = run_here("self_forcing_quantized.sh", env | {"NUM_OUTPUT_FRAMES": "6"}, tmp_path)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("videos/*.mp4")
    video = torch.from_numpy(np.stack(list(iio.imiter(path, plugin="FFMPEG")))).permute(0, 3, 1, 2) / 255
    assert "tiny-vae" in path.name and all(score(video, scene).values())


@torch.no_grad()
def test_it_starts_as_a_linear_map_of_the_latents():
    """Before its first step the decoder blurs the colours, but has them."""
    torch.manual_seed(0)
    latents = torch.randn(2, 4, 16, 8, 8)
    colors = torch.sigmoid(latents[:, :, :3])  # some smooth map
    frames = colors[:, 1:].repeat_interleave(4, dim=1)
    pixels = torch.cat([colors[:, :1], frames], dim=1).repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
    model = tiny_vae.TAEHV(tiny_vae.ENCODER_WIDTH, tiny_vae.DECODER_WIDTHS)
    tiny_vae.initialize(model, latents, pixels)
    assert tiny_vae.psnr(model.decode(latents), pixels) > 12 > tiny_vae.psnr(pixels.flip(0), pixels)


def test_the_program_writes_a_file_that_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny_vae, "GENERATED_FRAMES", 3)
    monkeypatch.setattr(tiny_vae, "SIZE", 64)
    generate, generated = tiny_vae.generated_clips, []

    def generate_once(*arguments) -> tiny_vae.Clips:
        if not generated:
            generated.append(generate(*arguments))
        return generated[0]

    monkeypatch.setattr(tiny_vae, "generated_clips", generate_once)
    arguments = "--drawn=1 --generated=1 --decoder_steps=2 --encoder_steps=2 --samples=1 --batch=6".split()
    tiny_vae.main([*arguments, f"--output={tmp_path / 'taew2_1.pth'}"])
    assert "dB" in capsys.readouterr().out
    state = torch.load(tmp_path / "taew2_1.pth", weights_only=True)
    assert {weight.dtype for weight in state.values()} == {torch.float16}
    TinyVAE.from_file(tmp_path / "taew2_1.pth")
