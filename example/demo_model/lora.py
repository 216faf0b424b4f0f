"""Train a small LoRA that teaches the embedded model a colour that its objects never had; see README.md.

    python example/demo_model/lora.py

The model stays as it is: only the low-rank factors are trained, as the transformer was (``generator.py``). The file has the
layout that diffusers and PEFT write, and is written now and then while the training runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import generator  # noqa: E402
from generator import Batch, World  # noqa: E402
from inferix.models.transformer import CausalWanTransformer  # noqa: E402
from pretrained import DemoModel  # noqa: E402
from score import summary  # noqa: E402
from world import LORA_COLORS, LORA_SCENES, SCENES, Scene, save_rows  # noqa: E402


class LowRank(nn.Module):
    """Parametrization of a weight [out, in]: the weight plus B @ A."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.up @ self.down


def add_low_rank(model: CausalWanTransformer, rank: int) -> dict[str, LowRank]:
    """Put a ``LowRank`` beside the weight of every Linear of the blocks; return them by the Linears' names."""
    added = {}
    for name, module in list(model.blocks.named_modules(prefix="blocks")):
        if isinstance(module, nn.Linear):
            added[name] = LowRank(module.weight, rank)
            parametrize.register_parametrization(module, "weight", added[name])
    return added


def save(factors: dict[str, LowRank], path: Path) -> None:
    """Write the factors as diffusers does, in float16; without an alpha the product counts as it is."""
    state = {}
    for name, factor in factors.items():
        state[f"transformer.{name}.lora_A.weight"] = factor.down.detach().half().cpu()
        state[f"transformer.{name}.lora_B.weight"] = factor.up.detach().half().cpu()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})


def batches(world: World, size: int, end: float) -> Iterator[Batch]:
    """Yield batches until ``time.perf_counter()`` is ``end``: first blocks mostly, since the later ones copy what is there."""
    for step in count():
        if time.perf_counter() > end:
            return
        if step % 4 < 3:
            yield generator.opening_batch(world, 7 * size)
        elif step % 8 == 3:
            yield generator.clip_batch(world, size)
        else:
            yield generator.turning_batch(world, size)


def train(demo: DemoModel, factors: dict[str, LowRank], args: argparse.Namespace) -> None:
    """Train the factors on the new scenes and on some that the model knows, so that it forgets none."""
    start = time.perf_counter()
    known = [SCENES[i] for i in torch.randperm(len(SCENES))[: args.known].tolist()]
    world = demo.world([*LORA_SCENES, *known], args.starts)
    print(
        f"latents of {len(LORA_SCENES)} new scenes and {len(known)} others: {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    parameters = [parameter for factor in factors.values() for parameter in factor.parameters()]
    step = generator.TrainingStep(demo.transformer, demo.text_encoder, world, parameters)

    def log(number: int, steps: int, **values: Tensor) -> None:
        if number % max(1, steps // 30) == 0 or number == steps - 1:
            text = "  ".join(f"{name} {value.item():.5f}" for name, value in values.items())
            print(f"{number:5d}/{steps}  {text}  {time.perf_counter() - start:.0f} s", flush=True)
        if number % max(1, steps // 10) == 0:
            save(factors, args.output)

    end = time.perf_counter() + args.seconds
    generator.fit(step, batches(world, args.batch, end), args.steps, args.learning_rate, log)
    save(factors, args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1000:.0f} kB", flush=True)


def report(demo: DemoModel, scenes: Sequence[Scene], title: str, picture: Path | None = None) -> None:
    """Generate the scenes' videos and print how many show what they should; ``picture``: some frames of each."""
    latents = demo.generate([scene.prompt for scene in scenes], generator.NUM_FRAMES, seed=1)
    videos = demo.decode(latents)
    print(f"{title}: {summary(videos, scenes)}", flush=True)
    if picture:
        save_rows(picture, videos[:, ::10])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop the training after this time")
    parser.add_argument("--batch", type=int, default=8, help="clips of a step, or seven times as many first blocks")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--known", type=int, default=48, help="scenes to train on that the model knows")
    parser.add_argument("--starts", type=int, default=4, help="places that a scene's clips start from")
    parser.add_argument("--samples", type=int, default=24, help="new and known scenes to try it on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/demo", help="the embedded model")
    parser.add_argument("--output", type=Path, help="default: lora/COLOUR.safetensors there")
    args = parser.parse_args(arguments)
    args.output = args.output or args.weights / f"lora/{next(iter(LORA_COLORS))}.safetensors"
    torch.manual_seed(args.seed)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every one of the blocks' shapes
    demo = DemoModel(args.weights, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    new, known = (few[:: max(1, len(few) // args.samples)][: args.samples] for few in (LORA_SCENES, SCENES))
    report(demo, new, "new scenes before")
    factors = add_low_rank(demo.transformer, args.rank)
    train(demo, factors, args)
    report(demo, new, "new scenes after", ROOT / f"outputs/demo_model/lora_{args.output.stem}.png")
    report(demo, known, "known scenes after")


if __name__ == "__main__":
    main()
