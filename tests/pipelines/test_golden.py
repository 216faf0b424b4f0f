"""The engine computes what the reference implementations compute: golden/expected, see the README there.

Float32 on the CPU: 1e-3 on latents, embeddings, flows and caches, 5e-3 on the videos, which are stored as float16.
"""

from dataclasses import replace

import pytest
import torch
from conftest import BASE, GOLDEN
from safetensors.torch import load_file
from torch import Tensor

from inferix import SelfForcingPipeline
from inferix.models.scheduler import FlowMatchScheduler

PROMPTS = [
    "A red cat walks on the moon",
    "A blue robot dances in the forest, slowly",
    "A green bird flies over the sea",
]


def expected(name: str, *keys: str) -> tuple[Tensor, ...]:
    """Return tensors of a golden file."""
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
    actual_ids, actual_mask = encoder.tokenize(PROMPTS[:2])
    assert torch.equal(actual_ids, ids) and torch.equal(actual_mask, mask)
    assert_near(encoder(PROMPTS[:2]), embeds)


def test_scheduler():
    timesteps, shift5, shift8 = expected("scheduler", "self_forcing_timesteps", "sigmas_shift5", "sigmas_shift8")
    for shift, sigmas in ((5.0, shift5), (8.0, shift8)):
        torch.testing.assert_close(FlowMatchScheduler(shift).sigmas, sigmas, rtol=0, atol=1e-6)
    steps = FlowMatchScheduler(5.0).steps([1000, 750, 500, 250], warp=True)
    assert_near(torch.tensor([step.timestep for step in steps]), timesteps)


def test_transformer(self_forcing):
    embeds, keys, values = expected("transformer", "prompt_embeds", "k_cache_layer0", "v_cache_layer0")
    parts = self_forcing.pipeline
    model, scheduler = parts.generator.model, parts.generator.scheduler
    with torch.no_grad():
        cache = parts.new_cache(parts.plan((1, 6, 16, 8, 12), 0, 6))
        encoder_kv = model.embed_text(embeds)
        for block in (0, 1):
            names = (f"latent_{block}", f"timestep_{block}", f"flow_{block}", f"x0_{block}")
            latent, timestep, flow, x0 = expected("transformer", *names)
            frames = range(3 * block, 3 * block + 3)
            cache.set_positions(frames)
            actual = model(latent, timestep, model.rotary_emb(frames, 8, 12), encoder_kv, cache)
            assert_near(actual, flow)
            assert_near(scheduler.pred_x0(latent, actual, scheduler.sigma(timestep[0, 0].item())), x0)
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
    decode = self_forcing.pipeline.vae.streaming_decoder()
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


def test_causvid_loads_the_encoder_before_its_first_block(causvid):
    """Which the next rollout begins with: importing it then would halt the video for a second."""
    causvid.pipeline.vae.model = None
    next(causvid.stream(PROMPTS[0], num_rollout=2, num_frames=9))
    assert causvid.pipeline.vae.model is not None


def test_a_single_rollout_needs_no_encoder(causvid):
    causvid.pipeline.vae.model = None
    assert len(list(causvid.stream(PROMPTS[0], num_rollout=1, num_frames=9))) == 3
    assert causvid.pipeline.vae.model is None


# --- Causal-Forcing: blocks of one frame, other steps for the first block, an image as frame 0 ---


@pytest.mark.parametrize(
    ("name", "config", "seed"),
    [
        ("causal_forcing_framewise", "causal_forcing_framewise", 40),
        ("causal_forcing_framewise_2step", "causal_forcing_framewise_2step", 41),
        ("causal_forcing_framewise_i2v", "causal_forcing_framewise", 42),
        ("causal_forcing_framewise_2step_i2v", "causal_forcing_framewise_2step", 43),
    ],
)
def test_causal_forcing(name, config, seed):
    pipeline = SelfForcingPipeline(GOLDEN / f"configs/{config}.yaml", wan_base_model_path=BASE, device="cpu")
    pipeline.load_checkpoint(GOLDEN / "CausalForcing/framewise/causal_forcing.pt", use_ema=True)
    pipeline.setup_devices()
    tensors = load_file(GOLDEN / f"expected/{name}.safetensors")
    generator = torch.Generator().manual_seed(seed)
    noise, given = draw(tensors["noise"], generator), tensors.get("initial_latent")
    assert torch.equal(noise, tensors["noise"])
    _, latents = pipeline.pipeline.inference(
        noise, PROMPTS[:1], initial_latent=given, generator=generator, return_latents=True
    )
    assert_near(latents, tensors["latents"])
    if "image" in tensors:
        assert_near(pipeline.pipeline.vae.encode(tensors["image"].transpose(1, 2)), given)
        generated = pipeline.generate(PROMPTS[:1], 4, torch.Generator().manual_seed(seed), tensors["image"][0, :, 0])
        assert_near(generated, pipeline.pipeline.vae.decode(tensors["latents"]))


# --- LongLive: a rolling window with sinks, prompts that change, relative positions ---


@pytest.fixture(scope="module")
def long_live():
    """Return a function that builds LongLive's pipeline, base and LoRA, with one of its configs."""

    def build(name: str, **options) -> SelfForcingPipeline:
        config = GOLDEN / f"configs/{name}.yaml"
        pipeline = SelfForcingPipeline(config, wan_base_model_path=BASE, device="cpu", **options)
        pipeline.load_checkpoint(GOLDEN / "LongLive/models/longlive_base.pt")
        pipeline.load_lora(GOLDEN / "LongLive/models/lora.pt")
        pipeline.setup_devices()
        return pipeline

    return build


@pytest.mark.parametrize("offload", [False, True], ids=["", "offload"])
@pytest.mark.parametrize(
    ("name", "seed"),
    [("longlive", 31), ("longlive_infinite", 31), ("longlive_interactive", 32), ("longlive_interactive_nosink", 32)],
)
def test_longlive(long_live, name, seed, offload):
    pipeline = long_live(name, enable_kv_offload=offload)
    noise, latents = expected(name, "noise", "latents")
    generator = torch.Generator().manual_seed(seed)
    assert torch.equal(draw(noise, generator), noise)
    prompts = {"text_prompts": PROMPTS[:1]}
    if "interactive" in name:
        prompts = {"text_prompts_list": [[prompt] for prompt in PROMPTS], "switch_frame_indices": [6, 16]}
    _, actual = pipeline.pipeline.inference(noise, generator=generator, return_latents=True, **prompts)
    assert_near(actual, latents)


def test_a_stream_asks_for_the_prompt_before_every_block(long_live):
    """The switches of longlive_interactive, from an iterator."""
    pipeline = long_live("longlive_interactive")
    noise, latents = expected("longlive_interactive", "noise", "latents")
    pipeline.config = replace(pipeline.config, image_or_video_shape=(1, 24, 16, 8, 12))  # all noise drawn at once
    asked = []

    def prompts():
        for start in range(0, 24, 3):
            asked.append(start)
            yield [PROMPTS[0 if start < 6 else 1 if start < 18 else 2]]

    pieces = []
    for piece in pipeline.stream(prompts(), 24, torch.Generator().manual_seed(32)):
        pieces.append(piece)
        assert len(asked) == len(pieces)
    assert_near(torch.cat(pieces, dim=1), pipeline.pipeline.vae.decode(latents))
