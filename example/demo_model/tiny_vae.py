"""Distils the embedded model's tiny VAE from its VAE, on one CPU core, and writes it next to that.

    python example/demo_model/tiny_vae.py

The decoder learns the pixels that the VAE makes of latents, of drawn videos and of generated ones; the encoder learns the
latents. Both are trained on windows of the frame near the object, coded by the VAE as if they were all of it: there is
more to see in them, and inside of them the VAE's pixels are the same to 38 dB and more.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from export import BASE, SELF_FORCING  # noqa: E402
from inferix import SelfForcingPipeline  # noqa: E402
from inferix.models.tiny_vae import TAEHV, MemoryBlock, TinyVAE  # noqa: E402
from inferix.models.vae import WanVAE  # noqa: E402
from vae import random_clips  # noqa: E402
from world import SCENES, SIZE  # noqa: E402

ENCODER_WIDTH, DECODER_WIDTHS = 8, (48, 32, 8, 8)
WINDOW = 8  # latent pixels
CPU = torch.device("cpu")
Clips = tuple[Tensor, Tensor]
"""Latents [N, F, 16, h, w], normalised, and what the VAE decodes them to, pixels [N, T, 3, 8h, 8w]."""


@torch.no_grad()
def drawn_clips(vae: WanVAE, count: int, frames: int, window: int = 8 * WINDOW) -> Clips:
    """Draw random scenes' videos, in windows, and send each through the VAE, there and back."""
    latents = [vae.encode(random_clips(1, frames, CPU, window)[0] * 2 - 1) for _ in range(count)]
    return torch.cat(latents), torch.cat([vae.decode(clip) for clip in latents])


@torch.no_grad()
def generated_latents(weights: Path, prompts: list[str], num_latents: int, seed: int) -> Tensor:
    """Generate the prompts' videos as latents [N, F, 16, h, w]."""
    config = ROOT / "example/self_forcing/configs/self_forcing_demo.yaml"
    pipeline = SelfForcingPipeline(config, wan_base_model_path=weights / BASE, device="cpu", dtype=torch.float32)
    pipeline.load_checkpoint(weights / SELF_FORCING)
    pipeline.setup_devices()
    engine, generator, videos = pipeline.pipeline, torch.Generator().manual_seed(seed), []
    for prompt in prompts:
        noise = torch.randn(1, num_latents, 16, SIZE // 8, SIZE // 8, generator=generator)
        videos += [torch.cat(list(engine.denoise(noise, engine.text_encoder([prompt]), None, generator)), dim=1)]
    return torch.cat(videos)


@torch.no_grad()
def decoded_windows(vae: WanVAE, latents: Tensor, count: int) -> Clips:
    """Cut ``count`` random windows out of every video's latents, and decode them."""
    cut = []
    for clip in latents.repeat_interleave(count, dim=0):
        top, left = torch.randint(SIZE // 8 - WINDOW + 1, (2,)).tolist()
        cut.append(clip[None, :, :, top : top + WINDOW, left : left + WINDOW])
    return torch.cat(cut), torch.cat([vae.decode(window) for window in cut])


@torch.no_grad()
def initialize(model: TAEHV, latents: Tensor, pixels: Tensor) -> None:
    """Start the decoder as the linear map from latents to the colours of their 8x8 pixels, blurred over them.

    Each latent channel goes through as it is and negated, since ReLUs let only positive values pass, and so do the three
    colours in the last stage. All residual branches start at zero, and the other channels at random.
    """
    for block in model.modules():
        if isinstance(block, MemoryBlock):
            nn.init.zeros_(block.conv[4].weight)
            nn.init.zeros_(block.conv[4].bias)
    limited = 3 * torch.tanh(latents[:, 1:] / 3)
    colors = F.avg_pool3d(pixels[:, 1:].transpose(1, 2), (4, 8, 8)).transpose(1, 2)
    limited, colors = (x.permute(0, 1, 3, 4, 2).flatten(0, 3) for x in (limited, colors))
    solution = torch.linalg.lstsq(F.pad(limited, (0, 1), value=1.0), colors).solution  # [17, 3]
    linear, bias = solution[:-1].T, solution[-1]
    layers, eye = model.decoder, torch.eye
    for layer in (layers[7].conv, layers[13].conv, layers[19].conv):
        layer.weight.mul_(0.3)
        layer.weight += eye(layer.in_channels).repeat(layer.out_channels // layer.in_channels, 1)[..., None, None]
    set_middle(layers[1], torch.cat([eye(16), -eye(16)]))
    layers[1].bias[:32] = 0
    set_middle(layers[8], eye(32, layers[8].in_channels))
    both = torch.cat([linear, -linear], dim=1)
    set_middle(layers[14], torch.cat([both, -both]))
    set_middle(layers[20], eye(6, layers[20].in_channels))
    set_middle(layers[22], torch.cat([eye(3), -eye(3)], dim=1))
    layers[22].bias.copy_(bias)


def set_middle(conv: nn.Conv2d, matrix: Tensor) -> None:
    """Let the first output channels be ``matrix`` [o, i] times the first input channels, pixel by pixel."""
    outputs, inputs = matrix.shape
    conv.weight.mul_(0.3)
    conv.weight[:outputs] = 0
    conv.weight[:outputs, :inputs, 1, 1] = matrix


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) for the weights of convolutions, as matrices [C', C*k*k].

    It takes a third of the steps that AdamW does here. torch.optim's takes matrices only, and works in bfloat16, which a
    CPU may be slow at.
    """

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalized(weight.grad.lerp(average, group["momentum"]).flatten(1))
                scale = max(1, update.shape[0] / update.shape[1]) ** 0.5
                weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)


def orthogonalized(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns, roughly: five Newton-Schulz steps."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def fit(network: nn.Module, steps: int, rates: tuple[float, float], loss_of: Callable[[int], Tensor]) -> None:
    """Minimise ``loss_of(step)`` and leave in the parameters their moving average.

    ``rates`` are the learning rates of weights (Muon) and of biases (AdamW).
    """
    parameters, start = list(network.parameters()), time.perf_counter()
    weights, biases = ([p for p in parameters if (p.ndim == 4) == is_weight] for is_weight in (True, False))
    optimizers = [Muon(weights, rates[0]), torch.optim.AdamW(biases, rates[1], betas=(0.9, 0.98), weight_decay=0)]
    decay = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1, (i + 1) / 20, (steps - i) / (0.6 * steps)))
        for o in optimizers
    ]
    averages = [parameter.detach().clone() for parameter in parameters]
    for step in range(steps):
        loss = loss_of(step)
        network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, decay):
            optimizer.step()
            schedule.step()
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - min(0.98, (step + 1) / (step + 10)))
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            print(f"  {step:5d}/{steps}  loss {loss.item():.5f}  {time.perf_counter() - start:.0f} s", flush=True)
    for parameter, average in zip(parameters, averages):
        parameter.data.copy_(average)


def error(actual: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error and, of more weight where it is large, squared error."""
    difference = actual - wanted
    return difference.abs().mean() + 4 * difference.square().mean()


def distil(model: TAEHV, clips: list[Clips], decoder_steps: int, encoder_steps: int) -> None:
    """Train the decoder on the pixels of all ``clips``, a set a step, and the encoder on the latents of the first set."""

    def batch(step: int) -> Clips:
        latents, pixels = clips[step % len(clips)]
        chosen = torch.randint(len(latents), (max(1, 12 // latents.shape[1]),))
        return latents[chosen], pixels[chosen]

    def decoder_loss(step: int) -> Tensor:
        latents, pixels = batch(step)
        return error(model.decode(latents), pixels)

    def encoder_loss(step: int) -> Tensor:
        latents, pixels = batch(step)
        # a latent's four frames are then the ones that the decoder makes of it
        return error(model.encode(torch.cat([pixels[:, :1].expand(-1, 3, -1, -1, -1), pixels], dim=1)), latents)

    initialize(model, *clips[0])
    print("decoder", flush=True)
    fit(model.decoder, decoder_steps, (0.006, 0.002), decoder_loss)
    print("encoder", flush=True)
    fit(model.encoder, encoder_steps, (0.006, 0.002), encoder_loss)


def psnr(actual: Tensor, wanted: Tensor) -> float:
    """In dB, of pixels in [0, 1]."""
    return -10 * torch.log10((actual - wanted).square().mean()).item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--drawn", type=int, default=256, help="drawn videos of 9 frames, and an eighth of 17")
    parser.add_argument("--generated", type=int, default=8, help="generated videos")
    parser.add_argument("--decoder_steps", type=int, default=1200)
    parser.add_argument("--encoder_steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/demo", help="the embedded model")
    parser.add_argument("--output", type=Path, help="default: taew2_1.pth next to the VAE")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    vae = WanVAE.from_file(args.weights / BASE / "Wan2.1_VAE.pth").to(CPU, torch.float32)
    prompts = [SCENES[i].prompt for i in torch.randperm(len(SCENES))[: args.generated].tolist()]
    clips = [
        drawn_clips(vae, args.drawn, 9),
        drawn_clips(vae, max(1, args.drawn // 8), 17),
        decoded_windows(vae, generated_latents(args.weights, prompts, 9, args.seed), 5),
    ]
    print(f"clips: {time.perf_counter() - start:.0f} s", flush=True)
    model = TAEHV(ENCODER_WIDTH, DECODER_WIDTHS).to(memory_format=torch.channels_last)
    distil(model, clips, args.decoder_steps, args.encoder_steps)
    path = args.output or args.weights / BASE / "taew2_1.pth"
    torch.save({name: weight.half().contiguous() for name, weight in model.state_dict().items()}, path)
    tiny = TinyVAE.from_file(path).to(CPU, torch.float32)
    latents, pixels = drawn_clips(vae, 8, 17, window=SIZE)
    print(f"{path}: {path.stat().st_size} bytes, {time.perf_counter() - start:.0f} s in all")
    print(f"to the VAE's pixels of new videos: {psnr(tiny.decode(latents), pixels):.1f} dB")


if __name__ == "__main__":
    main()
