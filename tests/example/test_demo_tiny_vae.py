"""The embedded model's tiny VAE shows what its VAE shows, and the program that made it runs."""

import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "example/demo_model"))
import tiny_vae
from inferix.models.tiny_vae import TinyVAE
from inferix.models.vae import WanVAE
from world import SIZE

WEIGHTS = ROOT / "weights/demo"
BASE = WEIGHTS / "Wan2.1-T2V-demo"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def full() -> WanVAE:
    return WanVAE.from_file(BASE / "Wan2.1_VAE.pth").to(CPU, torch.float32)


@pytest.fixture(scope="module")
def tiny() -> TinyVAE:
    return TinyVAE.from_file(BASE / "taew2_1.pth").to(CPU, torch.float32)


def in_blocks(vae: TinyVAE, latents: torch.Tensor) -> torch.Tensor:
    decode = vae.streaming_decoder()
    return torch.cat([decode(block) for block in latents.split(3, dim=1)], dim=1)


def test_its_file_is_small():
    assert (BASE / "taew2_1.pth").stat().st_size <= 1_000_000


def test_drawn_videos_decode_as_by_the_full_vae(full, tiny):
    """Videos that its training did not draw, at their full size."""
    torch.manual_seed(1000)
    latents, pixels = tiny_vae.drawn_clips(full, 6, 17, SIZE)
    assert tiny_vae.psnr(in_blocks(tiny, latents), pixels) >= 30


def test_generated_videos_decode_as_by_the_full_vae(full, tiny):
    prompts = [f"A {what} on a gray background" for what in ("red square moves from left to right",)]
    latents = tiny_vae.generated_latents(WEIGHTS, prompts, 9, seed=1000)
    assert tiny_vae.psnr(in_blocks(tiny, latents), full.decode(latents)) >= 30


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


def test_the_program_writes_a_file_that_loads(tmp_path, capsys):
    arguments = ["--drawn=2", "--generated=1", "--decoder_steps=2", "--encoder_steps=2"]
    tiny_vae.main([*arguments, f"--output={tmp_path / 'taew2_1.pth'}"])
    assert "dB" in capsys.readouterr().out
    state = torch.load(tmp_path / "taew2_1.pth", weights_only=True)
    assert {weight.dtype for weight in state.values()} == {torch.float16}
    TinyVAE.from_file(tmp_path / "taew2_1.pth")
