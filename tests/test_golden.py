"""The engine computes what the reference implementations compute: every tensor under golden/expected (see its README).

Float32 on the CPU: 1e-3 on latents, embeddings, flows and caches, 5e-3 on the videos, which are stored as float16.
"""

import pytest
import torch
from conftest import GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from inferix.models.vae import StreamingDecoder
from inferix.scheduler import FlowMatchScheduler

PROMPTS = ["A red cat walks on the moon", "A blue robot dances in the forest, slowly"]
checked: dict[str, set[str]] = {}


def expected(name: str, *keys: str) -> tuple[Tensor, ...]:
    """Tensors of a golden file, which count as tested from now on."""
    checked.setdefault(name, set()).update(keys)
    tensors = load_file(GOLDEN / f"expected/{name}.safetensors")
    return tuple(tensors[key] for key in keys)


def assert_near(actual: Tensor, wanted: Tensor) -> None:
    """Equal to the golden data's tolerance, absolute."""
    tolerance = 5e-3 if wanted.dtype == torch.float16 else 1e-3
    torch.testing.assert_close(actual.float(), wanted.float(), rtol=0, atol=tolerance)


def draw(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator)


def test_text(self_forcing):
    ids, mask, embeds = expected("text", "input_ids", "attention_mask", "prompt_embeds")
    encoder = self_forcing.pipeline.text_encoder
    actual_ids, actual_mask = encoder.tokenize(PROMPTS)
    assert torch.equal(actual_ids, ids) and torch.equal(actual_mask, mask)
    assert_near(encoder(PROMPTS), embeds)


def test_scheduler():
    timesteps, shift5, shift8 = expected("scheduler", "self_forcing_timesteps", "sigmas_shift5", "sigmas_shift8")
    self_forcing = FlowMatchScheduler(5.0, [1000, 750, 500, 250], warp=True)
    assert_near(torch.tensor(self_forcing.denoising_timesteps), timesteps)
    for sigmas, scheduler in ((shift5, self_forcing), (shift8, FlowMatchScheduler(8.0, [1000], warp=False))):
        torch.testing.assert_close(scheduler.sigmas, sigmas, rtol=0, atol=1e-6)


def test_transformer(self_forcing):
    embeds, keys, values = expected("transformer", "prompt_embeds", "k_cache_layer0", "v_cache_layer0")
    model, scheduler = self_forcing.pipeline.generator.model, self_forcing.pipeline.generator.scheduler
    with torch.no_grad():
        cache = self_forcing.pipeline.empty_cache(batch=1, num_frames=6, tokens_per_frame=24)
        cache.set_text(model.embed_text(embeds))
        for block in (0, 1):
            names = (f"latent_{block}", f"timestep_{block}", f"flow_{block}", f"x0_{block}")
            latent, timestep, flow, x0 = expected("transformer", *names)
            rope = model.rope(torch.arange(3 * block, 3 * block + 3), *latent.shape[-2:])
            cache.place(3 * block, 3)
            actual = model(latent, timestep, rope, cache)
            assert_near(actual, flow)
            assert_near(scheduler.to_x0(latent, actual, scheduler.sigma(timestep[0, 0].item())), x0)
    assert_near(cache.keys[0].flatten(1, 2), keys)
    assert_near(cache.values[0].flatten(1, 2), values)


def test_vae(self_forcing):
    vae = self_forcing.pipeline.vae
    pixels, latents = expected("vae", "pixels", "latents")
    assert_near(vae.encode(pixels.transpose(1, 2)), latents)
    latents, pixels = expected("vae", "decode_latents", "decode_pixels")
    assert_near(vae.decode(latents) * 2 - 1, pixels)


@pytest.mark.parametrize("pieces", [[3, 3, 3], [1, 3, 5], [1] * 9, [2, 7]], ids=str)
def test_streaming_decode_equals_whole_decode(self_forcing, pieces):
    latents, video = expected("self_forcing", "latents", "video")
    decode = StreamingDecoder(self_forcing.pipeline.vae)
    streamed = [decode(piece) for piece in latents.split(pieces, dim=1)]
    assert [piece.shape[1] for piece in streamed] == [4 * pieces[0] - 3, *(4 * piece for piece in pieces[1:])]
    whole = self_forcing.pipeline.vae.decode(latents)
    torch.testing.assert_close(torch.cat(streamed, dim=1), whole, rtol=0, atol=1e-4)
    assert_near(whole, video)


@pytest.mark.parametrize(("name", "batch", "seed"), [("self_forcing", 1, 0), ("self_forcing_batch2", 2, 3)])
def test_self_forcing(self_forcing, name, batch, seed):
    noise, latents, video = expected(name, "noise", "latents", "video")
    generator = torch.Generator().manual_seed(seed)
    drawn = draw(noise, generator)
    assert torch.equal(drawn, noise)
    actual = self_forcing.pipeline.inference(drawn, PROMPTS[:batch], generator=generator, return_latents=True)
    assert_near(actual[0], video)
    assert_near(actual[1], latents)


def test_self_forcing_generate_draws_in_the_references_order(self_forcing):
    latents, video = expected("self_forcing", "latents", "video")
    generator = torch.Generator().manual_seed(0)
    assert_near(self_forcing.generate(PROMPTS[:1], latents.shape[1], generator), video)


def test_image_to_video(self_forcing):
    keys = ("image", "initial_latent", "noise", "latents", "video")
    image, initial_latent, noise, latents, video = expected("self_forcing_i2v", *keys)
    generator = torch.Generator().manual_seed(4)
    drawn = draw(noise, generator)
    assert torch.equal(drawn, noise)
    encoded = self_forcing.pipeline.vae.encode(image.transpose(1, 2))
    assert_near(encoded, initial_latent)
    actual = self_forcing.pipeline.inference(
        drawn, PROMPTS[:1], initial_latent=encoded, generator=generator, return_latents=True
    )
    assert_near(actual[0], video)
    assert_near(actual[1], latents)
    generated = self_forcing.generate(PROMPTS[:1], 7, torch.Generator().manual_seed(4), image[0, :, 0])
    assert_near(generated, video)


def test_causvid_rollouts(causvid):
    """Each rollout on its own: what it starts from, draws and gives."""
    generator = torch.Generator().manual_seed(0)
    start = None
    for rollout in (0, 1):
        names = (f"noise_{rollout}", f"latents_{rollout}", f"start_latents_{rollout + 1}")
        noise, latents, next_start = expected("causvid", *names)
        drawn = draw(noise, generator)
        assert torch.equal(drawn, noise)
        video, actual = causvid.pipeline.inference(
            drawn, PROMPTS[:1], start_latents=start, generator=generator, return_latents=True
        )
        assert_near(actual, latents)
        first = causvid.pipeline.vae.encode(video[:, -9:-8] * 2 - 1)
        start = torch.cat([first, actual[:, -2:]], dim=1)
        assert_near(start, next_start)


def test_causvid_video(causvid):
    (video,) = expected("causvid", "video")
    generator = torch.Generator().manual_seed(0)
    assert_near(causvid.generate(PROMPTS[0], num_rollout=2, num_frames=9, generator=generator), video)


def test_every_golden_tensor_was_compared():
    files = {path.stem: set(load_file(path)) for path in (GOLDEN / "expected").glob("*.safetensors")}
    del files["taehv"]  # compared in models/test_tiny_vae.py
    assert checked == files
