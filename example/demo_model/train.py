"""Trains the embedded model from nothing and writes it to weights/demo: see README.md for the figures.

    python example/demo_model/train.py

Stages: the VAE on pictures, then on clips; the text encoder and the transformer on the VAE's latents of every video of
the world, on how they begin, on how they go on under a new prompt, and on windows of endless videos. Each stage is written as
soon as it is done, and ``--resume`` takes the stages that are there as they are.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import export  # noqa: E402
import generator  # noqa: E402
from inferix.models.transformer import CausalWanTransformer  # noqa: E402
from score import summary  # noqa: E402
from text import TEXT_LEN, build_text_encoder, build_tokenizer  # noqa: E402
from vae import build_vae, decode, encode, half_precision, normalize, train_on_clips, train_on_images, whole_clip  # noqa: E402
from world import SCENES, STARTS, Scene, render_many, save_rows  # noqa: E402


class Trainer:
    """The stages, and the files that they leave."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = build_tokenizer()
        args.work_folder.mkdir(parents=True, exist_ok=True)

    def stage(self, name: str, modules: dict[str, torch.nn.Module], train) -> None:
        """Load what an earlier run left of the stage, or run it and keep it."""
        path = self.args.work_folder / f"{name}.pt"
        if self.args.resume and path.exists():
            states = torch.load(path, map_location=self.device, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(states[key])
            print(f"{name}: taken from {path}", flush=True)
            return
        torch.manual_seed(self.args.seed)
        start = time.perf_counter()
        train()
        torch.save({key: module.state_dict() for key, module in modules.items()}, path)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)

    def logger(self, name: str):
        start = time.perf_counter()

        def log(step: int, steps: int, **values: Tensor) -> None:
            if step % max(1, steps // 25) == 0 or step in (5, 20) or step == steps - 1:
                text = "  ".join(f"{key} {value.item():.5f}" for key, value in values.items())
                pace = (time.perf_counter() - start) / (step + 1)
                print(f"{name} {step:5d}/{steps}  {text}  {pace:.3f} s/step", flush=True)

        return log

    def run(self) -> None:
        self.train_vae()
        self.world = self.encode_world()
        self.encoder = build_text_encoder(len(self.tokenizer)).to(self.device)
        model = CausalWanTransformer(generator.CONFIG).to(self.device)
        if self.device.type == "cuda":
            model.compile_repeated_blocks()
        self.train_transformer(model)
        folder = self.args.output_folder
        export.export_text_encoder(self.encoder, self.tokenizer, folder)
        export.export_base(model, folder)
        export.export_distilled(model, folder / export.SELF_FORCING, ("generator", "generator_ema"))
        export.export_distilled(model, folder / export.CAUSVID, ("generator",))
        for name in generator.SCHEDULES:
            self.sample(name, model)

    def train_vae(self) -> None:
        self.vae = whole_clip(build_vae()).to(self.device)
        args = self.args

        def clips():
            train_on_clips(self.vae, args.vae_steps, args.vae_batch, self.logger("vae"))
            normalize(self.vae)

        log = self.logger("images")
        self.stage(
            "images", {"vae": self.vae}, lambda: train_on_images(self.vae, args.image_steps, args.vae_batch, log)
        )
        self.stage("vae", {"vae": self.vae}, clips)
        self.vae.eval().requires_grad_(False)
        export.export_vae(self.vae, self.args.output_folder)
        shape = (1, 1, -1, 1, 1)
        config = self.vae.config
        self.mean = torch.tensor(config.latents_mean, device=self.device).view(shape)
        self.std = torch.tensor(config.latents_std, device=self.device).view(shape)

    @torch.no_grad()
    def encode_world(self) -> generator.World:
        """Every prompt from every start; the first prompts' videos also there and back, to see what the VAE keeps."""
        start, frames, latents = time.perf_counter(), torch.arange(4 * generator.NUM_FRAMES - 3, device=self.device), []
        for scene in SCENES:
            pixels, _ = render_many([scene] * len(STARTS), STARTS, frames)
            with half_precision(self.device):
                encoded = encode(self.vae, pixels).float().transpose(1, 2)
            latents.append(((encoded - self.mean) / self.std).to(torch.bfloat16))
        latents = torch.cat(latents).unflatten(0, (len(SCENES), len(STARTS)))
        tokens = self.tokenizer(
            [scene.prompt for scene in SCENES], padding="max_length", max_length=TEXT_LEN, return_tensors="pt"
        ).to(self.device)
        channels = latents[:, -1].float().std((0, 1, 3, 4))
        print(
            f"latents: {time.perf_counter() - start:.0f} s, {list(latents.shape)}, spread {channels.tolist()}",
            flush=True,
        )
        self.report("vae", self.checked_scenes(), latents[self.checked_prompts(), -1])
        return generator.World(latents, tokens.input_ids, tokens.attention_mask)

    def train_transformer(self, model: CausalWanTransformer) -> None:
        world, size, args = self.world, self.args.batch, self.args

        def clips():
            yield generator.clip_batch(world, size)

        def openings():
            for _ in range(4):
                yield generator.opening_batch(world, 7 * size)
            yield generator.clip_batch(world, size)

        def turns():
            for _ in range(2):
                yield generator.turning_batch(world, size)
            yield generator.clip_batch(world, size)
            yield generator.opening_batch(world, 7 * size)

        def switches():
            for _ in range(3):
                yield generator.switching_batch(world, size)
                yield generator.opening_batch(world, 7 * size)
            yield generator.clip_batch(world, size)
            yield generator.turning_batch(world, size)

        for batches, steps, rate in (
            (clips, args.clip_steps, 1e-3),
            (openings, args.opening_steps, 1e-3),
            (turns, args.turn_steps, 5e-4),
            (switches, args.switch_steps, 5e-4),
        ):
            self.stage(
                batches.__name__,
                {"transformer": model, "text_encoder": self.encoder},
                lambda: self.fit(model, batches, steps, rate),
            )
        model.eval()
        self.encoder.eval()

    def fit(self, model: CausalWanTransformer, batches, steps: int, learning_rate: float) -> None:
        """Train on what ``batches()`` yields, over and over."""
        parameters = [*model.parameters(), *self.encoder.parameters()]
        step = generator.TrainingStep(model, self.encoder, self.world, parameters)
        endless = (batch for _ in count() for batch in batches())
        generator.fit(step, endless, steps, learning_rate, self.logger(batches.__name__))

    def checked_prompts(self) -> list[int]:
        return list(range(0, len(SCENES), max(1, len(SCENES) // 48)))

    def checked_scenes(self) -> list[Scene]:
        return [SCENES[i] for i in self.checked_prompts()]

    @torch.no_grad()
    def sample(self, schedule: str, model: CausalWanTransformer) -> None:
        """Generate some prompts' videos and report what they show."""
        prompt = torch.tensor(self.checked_prompts(), device=self.device)
        shape = (len(prompt), *self.world.latents.shape[2:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.device)
        with half_precision(self.device):
            latents = generator.rollout(
                model,
                self.world.embed(self.encoder, prompt),
                generator.SCHEDULES[schedule],
                noise,
                noise[:, :0],
                generator.video_blocks(image=False),
            )
        error = (latents - self.world.latents[prompt, 0]).square().mean((0, 2, 3, 4))
        print(f"{schedule}: distance to the true latents per frame {[round(e, 4) for e in error.tolist()]}", flush=True)
        self.report(schedule, self.checked_scenes(), latents)

    @torch.no_grad()
    def report(self, title: str, scenes: list[Scene], latents: Tensor) -> None:
        """Decode latents [B, F, 16, h, w], print how many videos show what they should, and save some as a picture."""
        videos = []
        for part in latents.split(8):
            with half_precision(self.device):
                videos.append(decode(self.vae, (part * self.std + self.mean).transpose(1, 2)).clamp(0, 1).float())
        videos = torch.cat(videos)
        print(f"{title}: {summary(videos, scenes)}", flush=True)
        save_rows(self.args.work_folder / f"{title}.png", videos[:: max(1, len(videos) // 8), ::10])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--image_steps", type=int, default=2500)
    parser.add_argument("--vae_steps", type=int, default=300)
    parser.add_argument("--clip_steps", type=int, default=3600)
    parser.add_argument("--opening_steps", type=int, default=3000)
    parser.add_argument("--turn_steps", type=int, default=1000)
    parser.add_argument("--switch_steps", type=int, default=6000)
    parser.add_argument("--vae_batch", type=int, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_folder", type=Path, default=ROOT / "weights/demo")
    parser.add_argument("--work_folder", type=Path, default=ROOT / "outputs/demo_model", help="stages and samples")
    parser.add_argument("--resume", action="store_true", help="take the stages in --work_folder as they are")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every one of the blocks' shapes
    Trainer(parser.parse_args(arguments)).run()


if __name__ == "__main__":
    main()
