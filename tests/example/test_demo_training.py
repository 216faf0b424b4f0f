"""The embedded model's training: what it trains is what the engine loads and runs."""

import sys

import pytest
import torch
from conftest import GOLDEN, ROOT

sys.path.insert(0, str(ROOT / "example/demo_model"))
import export
import generator
import score
import train
import vae
import world
from inferix.checkpoints.containers import load_checkpoint
from inferix.models.base_model import WanCheckpoint
from inferix.models.scheduler import FlowMatchScheduler
from inferix.models.transformer import CausalWanTransformer
from text import build_text_encoder, build_tokenizer
from world import SCENES, STARTS


def assert_same_weights(loaded: torch.nn.Module, written: torch.nn.Module) -> None:
    expected = written.state_dict()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name].to(tensor.dtype))


def test_exports_load_in_the_engine(tmp_path):
    autoencoder, tokenizer = vae.build_vae(), build_tokenizer()
    encoder, model = build_text_encoder(len(tokenizer)), CausalWanTransformer(generator.CONFIG)
    export.export_vae(autoencoder, tmp_path)
    export.export_text_encoder(encoder, tokenizer, tmp_path)
    export.export_base(model, tmp_path)
    export.export_distilled(model, tmp_path / export.SELF_FORCING, ("generator", "generator_ema"))

    base = WanCheckpoint(tmp_path / export.BASE)
    assert base.config == generator.CONFIG
    assert_same_weights(base.transformer(), model)
    loaded = base.vae()
    loaded.load_encoder()
    assert_same_weights(loaded.model, autoencoder)
    assert_same_weights(base.text_encoder().model, encoder)
    for use_ema in (False, True):
        state = load_checkpoint(tmp_path / export.SELF_FORCING, use_ema).state
        assert state.keys() == model.state_dict().keys()


def test_vae_file_has_the_keys_of_the_original(tmp_path):
    export.export_vae(vae.build_vae(), tmp_path)
    written = torch.load(tmp_path / export.BASE / "Wan2.1_VAE.pth", weights_only=True)
    assert written.keys() == torch.load(GOLDEN / "Wan2.1-T2V-tiny/Wan2.1_VAE.pth", weights_only=True).keys()


def test_tokenizer_knows_the_world_and_nothing_else():
    tokenizer = build_tokenizer()
    for scene in SCENES:
        assert tokenizer.unk_token_id not in tokenizer(scene.prompt + ".").input_ids
    assert tokenizer("a cat").input_ids[1:] == [tokenizer.unk_token_id, tokenizer.eos_token_id]


@torch.no_grad()
def test_whole_clips_are_coded_like_pieces():
    pixels = torch.rand(2, 9, 3, 16, 16)
    autoencoder = vae.build_vae().eval()
    latents = autoencoder.encode(pixels.transpose(1, 2) * 2 - 1).latent_dist.mode()
    decoded = autoencoder.decode(latents).sample.transpose(1, 2)
    vae.whole_clip(autoencoder)
    torch.testing.assert_close(vae.encode(autoencoder, pixels), latents, atol=1e-4, rtol=0)
    whole = vae.decode(autoencoder, latents).clamp(0, 1) * 2 - 1
    torch.testing.assert_close(whole, decoded, atol=1e-4, rtol=0)


@torch.no_grad()
def test_normalizing_keeps_what_is_decoded(monkeypatch):
    monkeypatch.setattr(vae, "random_clips", lambda batch, frames, device: (torch.rand(batch, 5, 3, 16, 16), None))
    torch.manual_seed(0)
    autoencoder = vae.whole_clip(vae.build_vae()).eval()
    pixels = torch.rand(2, 5, 3, 16, 16)
    before = vae.decode(autoencoder, vae.encode(autoencoder, pixels))
    vae.normalize(autoencoder)
    latents = vae.encode(autoencoder, pixels)
    torch.testing.assert_close(vae.decode(autoencoder, latents), before, atol=1e-3, rtol=0)
    mean, std = (torch.tensor(autoencoder.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    assert ((latents - mean) / std).std().item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("image", (False, True))
@torch.no_grad()
def test_teacher_forcing_sees_what_the_cache_holds(image, monkeypatch):
    """All blocks at once on the right context predict what one block after the other does with a cache."""
    monkeypatch.setattr(generator, "NUM_FRAMES", 7)
    torch.manual_seed(0)
    model = CausalWanTransformer(generator.CONFIG)
    blocks, steps = generator.video_blocks(image), FlowMatchScheduler(5.0).steps([1000], warp=True)
    given, text, noise = int(image), torch.randn(1, 8, 64), torch.randn(1, 7, 16, 8, 8)
    latents = generator.rollout(model, text, steps, noise, noise[:, :given], blocks)
    level = torch.tensor([1000.0, 1.0])[:, None, None].expand(2, 1, 7)
    assert generator.x0_error(model, text, latents, noise, latents, level, blocks, given) < 1e-8


@pytest.mark.parametrize("seed", range(4))
def test_a_switched_window_goes_on_with_the_new_prompts_video(seed):
    """Latents that name their prompt, start and frame."""
    torch.manual_seed(seed)
    prompts, starts, frames = torch.meshgrid(*(torch.arange(n) for n in (5, 4, generator.NUM_FRAMES)), indexing="ij")
    latents = (1000 * prompts + 100 * starts + frames)[..., None, None, None].expand(-1, -1, -1, 16, 2, 2)
    batch = generator.switching_batch(generator.World(latents, prompts, prompts), 8)
    named = batch.x0[..., 0, 0, 0].long()
    sinks, length = batch.blocks[0][1] if batch.blocks[0][1] < batch.given else 0, named.shape[1]
    assert [end for _, end in batch.blocks][-1 - (length - batch.given) // 3 :] == list(
        range(batch.given, length + 1, 3)
    )
    assert (named[2:, batch.given :] == 1000 * batch.prompt[2:, None] + torch.arange(3, length - batch.given + 3)).all()
    same = named[:2, sinks:].diff()
    assert ((same == 1) | (same == 1 - generator.PERIOD)).all()  # no new prompt: the video goes on


def test_training_runs_and_resumes(tmp_path, monkeypatch, capsys):
    for name, frames in (("NUM_FRAMES", 6), ("WINDOW", 6), ("PERIOD", 2)):
        monkeypatch.setattr(generator, name, frames)
    for module in (world, score):
        monkeypatch.setattr(module, "SIZE", 64)
    monkeypatch.setattr(train, "SCENES", SCENES[:1])
    monkeypatch.setattr(train, "STARTS", STARTS[:1])
    monkeypatch.setattr(train, "train_on_images", lambda *arguments: None)
    monkeypatch.setattr(train, "train_on_clips", lambda *arguments: None)
    monkeypatch.setattr(train, "normalize", lambda autoencoder: None)
    stages = ("image", "vae", "clip", "opening", "turn", "switch")
    steps = [f"--{name}=1" for name in (*(f"{stage}_steps" for stage in stages), "vae_batch", "batch")]
    arguments = [*steps, f"--output_folder={tmp_path / 'demo'}", f"--work_folder={tmp_path / 'work'}"]
    train.main(arguments)
    for file in (export.SELF_FORCING, export.CAUSVID, f"{export.BASE}/config.json"):
        assert (tmp_path / "demo" / file).exists()
    capsys.readouterr()
    monkeypatch.setattr(train.Trainer, "report", lambda *arguments: None)  # the same videos again
    train.main([*arguments, "--resume"])
    assert capsys.readouterr().out.count("taken from") == 6
