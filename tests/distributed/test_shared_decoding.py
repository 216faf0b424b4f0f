"""Ranks that decode a video together, each some rows of its frames, compute what one rank does."""

import gc
import os

import pytest
import torch
from diffusers import AutoencoderKLWan
from forks import run_ranks
from torch import Tensor

from inferix.config import ParallelConfig
from inferix.distributed.context_parallel import ContextParallel, shutdown
from inferix.models.vae import WanVAE
from inferix.pipelines.workers import Workers

CLIPS = {"even": (1, 7, 16, 4, 6), "uneven": (1, 7, 16, 7, 5), "batch": (2, 4, 16, 5, 4), "low": (1, 2, 16, 1, 4)}
"""Shapes of latents; "low" has fewer rows than there are ranks."""


def build() -> WanVAE:
    """Return a VAE of random weights."""
    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=8)
    return WanVAE(model.state_dict(), dict(model.config))


def latents(name: str) -> Tensor:
    return torch.randn(CLIPS[name], generator=torch.Generator().manual_seed(1))


def decode_clips(vae: WanVAE) -> dict[str, Tensor]:
    """Decode every clip at once, and then two of them piece by piece in turns."""
    results = {name: vae.decode(latents(name)) for name in CLIPS}
    streams = {name: vae.streaming_decoder() for name in ("even", "uneven")}
    pieces: dict[str, list[Tensor]] = {name: [] for name in streams}
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        for name, stream in streams.items():
            pieces[name].append(stream(latents(name)[:, start:stop]))
    return results | {f"{name}.stream": torch.cat(parts, dim=1) for name, parts in pieces.items()}


@torch.no_grad()
def take_part(kind: str) -> tuple[set[int], dict[str, Tensor]]:
    """Be one rank of a job; return the heights of the latents that it computes, and in the main process the pixels."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    parallel = ContextParallel(ParallelConfig(world_size, 1, rank, rank, world_size), device)
    vae = build()
    vae.share(parallel)
    vae.to(device, torch.float32)
    vae.warm_up(CLIPS["even"])
    heights: list[int] = []
    vae.decoder.conv_in.register_forward_hook(lambda _, args, out: heights.append(out.shape[2]))
    results: dict[str, Tensor] = {}
    if parallel.is_main_process:
        results = decode_clips(vae)
        gc.collect()
        vae.decode(latents("even"))  # tells the others which streams have ended
        parallel.close()
        results["even.closed"] = vae.decode(latents("even"))
        results = {name: pixels.cpu() for name, pixels in results.items()}
    else:
        assert Workers(parallel, device, torch.float32, vae).start_clip() is None
        assert len(vae.streams) == 1
    shutdown()
    return set(heights), results


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    """The clips as one process decodes them."""
    with torch.no_grad():
        return {name: build().decode(latents(name)) for name in CLIPS}


def assert_like(pixels: dict[str, Tensor], alone: dict[str, Tensor], tolerance: float) -> None:
    assert pixels.keys() == {*alone, "even.stream", "uneven.stream", "even.closed"}
    for name, actual in pixels.items():
        assert actual.std() > 0.05
        torch.testing.assert_close(actual, alone[name.split(".")[0]], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("world_size", "heights"), [(2, [{1, 2, 3, 4}, {2, 3}]), (4, [{1, 2, 4}, {1, 2}, {1, 2}, {1}])]
)
def test_like_one_rank(alone, world_size, heights):
    ranks = [rank.value for rank in run_ranks(world_size, take_part, "cpu")]
    assert_like(ranks[0][1], alone, 1e-5)
    # the main process alone decodes a single row, and whole frames when the others have ended
    assert [computed for computed, _ in ranks] == heights


@pytest.mark.gpu
@pytest.mark.timeout(500)
def test_on_gpus(alone):
    """Compiled, and captured with its communication in CUDA graphs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    main_process, _ = run_ranks(2, take_part, "cuda", seconds=400, start_method="spawn")
    assert_like(main_process.value[1], alone, 1e-4)
