"""Distil the embedded model's tiny VAE from its VAE, and write it next to that; see README.md.

    python example/demo_model/tiny_vae.py

The decoder learns the pixels that the VAE makes of latents, of drawn videos and of generated ones; the encoder learns the
latents. Drawn videos are windows of the frame near the object, coded by the VAE as if they were all of it: there is more to
see in them, and inside of them the VAE's pixels are the same to 38 dB and more. The file is written now and then while the
training runs.
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

from export import BASE  # noqa: E402
from inferix.models.tiny_vae import TAEHV, MemoryBlock  # noqa: E402
from pretrained import DemoModel  # noqa: E402
from vae import random_clips  # noqa: E402
from world import SCENES, SIZE, save_rows  # noqa: E402

ENCODER_WIDTH, DECODER_WIDTHS = 8, (48, 32, 16, 16)
WINDOW = 64  # pixels
GENERATED_FRAMES = 9  # latent frames of a generated video
Clips = tuple[Tensor, Tensor]
"""Latents [N, F, 16, h, w], normalised, and what the VAE decodes them to, pixels [N, T, 3, 8h, 8w]."""


def drawn_clips(demo: DemoModel, count: int, frames: int, window: int = WINDOW) -> Clips:
    """Draw random scenes' videos, in windows, and send each through the VAE, there and back."""
    parts = [min(32, count - done) for done in range(0, count, 32)]
    latents = torch.cat([demo.encode(random_clips(part, frames, demo.device, window)[0]) for part in parts])
    return latents, demo.decode(latents)


def generated_clips(demo: DemoModel, count: int, seed: int) -> Clips:
    """Generate random prompts' videos, and decode them."""
    chosen = torch.randperm(len(SCENES), generator=torch.Generator().manual_seed(seed))[:count]
    latents = demo.generate([SCENES[i].prompt for i in chosen.tolist()], GENERATED_FRAMES, seed)
    return latents, demo.decode(latents)


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
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                updates = torch.stack([self.update(weight, group["momentum"]) for weight in weights])
                scale = max(1, updates.shape[1] / updates.shape[2]) ** 0.5
                for weight, update in zip(weights, orthogonalized(updates)):
                    weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)

    def update(self, weight: Tensor, momentum: float) -> Tensor:
        """Return the direction of Nesterov's momentum, [C', C*k*k]."""
        average = self.state[weight].setdefault("average", torch.zeros_like(weight))
        average.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(average, momentum).flatten(1)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return the nearest matrices [N, r, c] with orthonormal rows or columns, roughly: five Newton-Schulz steps."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def fit(
    network: nn.Module,
    steps: int,
    seconds: float,
    rates: tuple[float, float],
    loss_of: Callable[[int], Tensor],
    save: Callable[[], None],
) -> None:
    """Minimise ``loss_of(step)`` and leave the parameters' moving average in them, in at most ``steps`` and ``seconds``.

    ``rates`` are the learning rates of weights (Muon) and of biases (AdamW). ``save`` is called a few times in between,
    and once at the end.
    """
    parameters, start = list(network.parameters()), time.perf_counter()
    weights, biases = ([p for p in parameters if (p.ndim == 4) == is_weight] for is_weight in (True, False))
    optimizers = [Muon(weights, rates[0]), torch.optim.AdamW(biases, rates[1], betas=(0.9, 0.98), weight_decay=0)]

    def rate(step: int) -> float:
        """Return the share of the learning rate; the last 0.6 of the training it falls to zero."""
        progress = max(step / steps, (time.perf_counter() - start) / seconds)
        return max(0, min(1, (step + 1) / 20, (1 - progress) / 0.6))

    decay = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
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
        if step % max(1, steps // 5) == 0:
            save()
        if time.perf_counter() - start > seconds:
            break
    for parameter, average in zip(parameters, averages):
        parameter.data.copy_(average)
    save()


def error(actual: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error and, of more weight where it is large, squared error."""
    difference = actual - wanted
    return difference.abs().mean() + 4 * difference.square().mean()


def distil(model: TAEHV, clips: list[Clips], args: argparse.Namespace) -> None:
    """Train the decoder on the pixels of all ``clips``, a set a step, and the encoder on the latents of the first set."""

    def batch(step: int) -> Clips:
        latents, pixels = clips[step % len(clips)]
        frame = latents.shape[1] * latents.shape[-1] * latents.shape[-2] / (WINDOW // 8) ** 2
        chosen = torch.randint(len(latents), (max(1, int(args.batch / frame)),))
        return latents[chosen], pixels[chosen]

    def decoder_loss(step: int) -> Tensor:
        latents, pixels = batch(step)
        return error(model.decode(latents), pixels)

    def encoder_loss(step: int) -> Tensor:
        latents, pixels = batch(step)
        # a latent's four frames are then the ones that the decoder makes of it
        return error(model.encode(torch.cat([pixels[:, :1].expand(-1, 3, -1, -1, -1), pixels], dim=1)), latents)

    def save() -> None:
        state = {name: weight.detach().half().cpu().contiguous() for name, weight in model.state_dict().items()}
        torch.save(state, args.output)

    rates = (0.006, 0.002)
    print("decoder", flush=True)
    fit(model.decoder, args.decoder_steps, args.seconds, rates, decoder_loss, save)
    print("encoder", flush=True)
    fit(model.encoder, args.encoder_steps, args.seconds / 8, rates, encoder_loss, save)


def psnr(actual: Tensor, wanted: Tensor) -> float:
    """In dB, of pixels in [0, 1]."""
    return -10 * torch.log10((actual - wanted).square().mean()).item()


@torch.no_grad()
def report(model: TAEHV, clips: Clips, title: str, picture: Path) -> None:
    """Print how near the tiny VAE comes to the VAE, and show some frames of both."""
    latents, pixels = clips
    decoded = torch.cat([model.decode(clip).clamp(0, 1) for clip in latents.split(8)])
    apart = sorted(psnr(video, wanted) for video, wanted in zip(decoded, pixels))
    print(f"{title}: {psnr(decoded, pixels):.1f} dB to the VAE's pixels, {apart[0]:.1f} to {apart[-1]:.1f}", flush=True)
    save_rows(picture, torch.stack([pixels[:8, ::4], decoded[:8, ::4]], dim=1).flatten(0, 1))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--drawn", type=int, default=1024, help="drawn videos of 9 frames, and an eighth of 17")
    parser.add_argument("--generated", type=int, default=48, help="generated videos")
    parser.add_argument("--decoder_steps", type=int, default=2000)
    parser.add_argument("--encoder_steps", type=int, default=1000)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop the decoder's training after this time"
    )
    parser.add_argument("--batch", type=int, default=96, help="latent frames of a step, of a window's size")
    parser.add_argument("--samples", type=int, default=8, help="new videos to try it on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/demo", help="the embedded model")
    parser.add_argument("--output", type=Path, help="default: taew2_1.pth next to the VAE")
    args = parser.parse_args(arguments)
    args.output = args.output or args.weights / BASE / "taew2_1.pth"
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    demo = DemoModel(args.weights, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    clips = [
        drawn_clips(demo, args.drawn, 9),
        drawn_clips(demo, max(1, args.drawn // 8), 17),
        generated_clips(demo, args.generated, args.seed),
    ]
    print(f"clips: {time.perf_counter() - start:.0f} s", flush=True)
    model = TAEHV(ENCODER_WIDTH, DECODER_WIDTHS)
    initialize(model, *(tensor[:64].cpu() for tensor in clips[0]))
    distil(model.to(demo.device, memory_format=torch.channels_last), clips, args)
    print(f"{args.output}: {args.output.stat().st_size} bytes, {time.perf_counter() - start:.0f} s in all")
    samples = ROOT / "outputs/demo_model"
    report(model, drawn_clips(demo, args.samples, 9, SIZE), "drawn videos", samples / "tiny_vae_drawn.png")
    report(model, generated_clips(demo, args.samples, args.seed + 1), "generated videos", samples / "tiny_vae.png")


if __name__ == "__main__":
    main()
