"""Does a video show what its prompt says?  Checks colour, shape, direction of travel and background automatically.

python example/demo_model/score.py                    # the table of the README: 216 prompts, both samplers
python example/demo_model/score.py --samplers causvid --quants int8 --prompts 12
python example/demo_model/score.py --lora weights/demo/lora/white.safetensors     # the prompts that the LoRA teaches
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from world import ALL_COLORS, BACKGROUNDS, COLORS, DIRECTIONS, LORA_SCENES, SCENES, SHAPES, SIZE, SPEED, Scene, coverage

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from inferix import CausVidPipeline, SelfForcingPipeline  # noqa: E402

SAMPLERS = {
    "self_forcing": (SelfForcingPipeline, "self_forcing/checkpoints/self_forcing_dmd.pt"),
    "causvid": (CausVidPipeline, "CausVid/autoregressive_checkpoint"),
}
QUANTS = ("none", "fp8", "int8")
CRITERIA = ("colour", "shape", "direction", "background")
ENOUGH = 0.9  # share of the frames that must show the right thing
MIN_OVERLAP = 0.8  # intersection over union of what is seen and the shape where it is seen
PALETTE = torch.tensor([*COLORS.values(), *BACKGROUNDS.values()])


def segment(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is seen in each frame of a video [T, 3, H, W].

    Returns the object's colour as an index of ``PALETTE`` [T], the index of the background [T], and the object's pixels
    [T, H, W]: those nearer to the object's colour, or to any other that is not the background's, than to the
    background's.
    """
    pixels = video.float().permute(0, 2, 3, 1).flatten(1, 2)  # [T, H*W, 3]
    distance = torch.cdist(pixels, PALETTE.to(video.device).expand(len(pixels), -1, -1))
    counts = torch.nn.functional.one_hot(distance.argmin(-1), len(PALETTE)).sum(1)  # [T, 9]
    background = counts[:, len(COLORS) :].argmax(-1)
    is_object = distance.argmin(-1) != len(COLORS) + background[:, None]
    inside = torch.where(is_object[..., None], pixels, torch.nan).nanmedian(dim=1).values  # [T, 3]
    to_inside = torch.cdist(inside.nan_to_num(-1), PALETTE.to(video.device))
    color = to_inside.scatter(1, len(COLORS) + background[:, None], torch.inf).argmin(-1)
    # an antialiased edge pixel is half one, half the other: cut half way
    foreground, background_color = PALETTE.to(video.device)[color], PALETTE.to(video.device)[len(COLORS) + background]
    axis = foreground - background_color
    share = ((pixels - background_color[:, None]) * axis[:, None]).sum(-1) / axis.square().sum(-1, keepdim=True)
    off_axis = (pixels - background_color[:, None] - share[..., None] * axis[:, None]).norm(dim=-1)
    mask = (share > 0.5) | (off_axis > 0.35)
    return color, background, mask.view(len(video), *video.shape[2:])


def centroids(mask: Tensor) -> Tensor:
    """Centroid (x, y) in pixels of each mask [T, H, W] on the torus, where the frame's edges meet: [T, 2]."""
    angle = (torch.arange(SIZE, device=mask.device) + 0.5) * (2 * torch.pi / SIZE)
    wave = torch.polar(torch.ones_like(angle), angle)
    profiles = torch.stack((mask.sum(1), mask.sum(2)), 1).float()  # [T, 2, SIZE]
    return (profiles.to(wave.dtype) @ wave).angle() % (2 * torch.pi) * SIZE / (2 * torch.pi)


def overlaps(mask: Tensor, center: Tensor) -> Tensor:
    """Intersection over union of each mask [T, H, W] with every shape at its centroid: [T, shapes].

    Anything else in the frame, a second object say, counts against it.
    """
    result = []
    for shape in SHAPES:
        template = coverage(shape, torch.full((1, 2), SIZE / 2, device=mask.device)) > 0.5
        template = coverage(shape, center + SIZE / 2 - centroids(template)) > 0.5
        both, either = (template & mask).sum((1, 2)), (template | mask).sum((1, 2))
        result.append(both / either)
    return torch.stack(result, 1)


def travel(center: Tensor) -> Tensor:
    """How far (x, y) centroids [T, 2] go in all, wraps around the edges counted through: [2]."""
    steps = (center.diff(dim=0) + SIZE / 2) % SIZE - SIZE / 2
    return steps.sum(0)


def score(video: Tensor, scene: Scene) -> dict[str, bool]:
    """Check a video [T, 3, 128, 128] in [0, 1] against the scene that its prompt asks for."""
    color, background, mask = segment(video)
    center = centroids(mask)
    overlap = overlaps(mask, center)
    moved, (dx, dy) = travel(center), DIRECTIONS[scene.direction]
    expected = SPEED * (len(video) - 1)
    wanted = torch.cdist(torch.tensor([ALL_COLORS[scene.color]]), PALETTE).argmin()
    along, across = (moved[0] * dx + moved[1] * dy).item(), (moved[0] * dy + moved[1] * dx).abs().item()
    recognized = overlap.amax(1) >= MIN_OVERLAP  # exactly one known shape, of the right size

    def often(right: Tensor) -> bool:
        return right.float().mean().item() >= ENOUGH

    return {
        "colour": often(recognized & (color == wanted.item())),
        "shape": often(recognized & (overlap.argmax(1) == SHAPES.index(scene.shape))),
        "direction": often(recognized) and expected / 2 <= along <= expected * 1.5 and across <= expected / 10,
        "background": often(background == list(BACKGROUNDS).index(scene.background)),
    }


def summary(videos: Iterable[Tensor], scenes: Sequence[Scene]) -> str:
    """Say how many of the videos [T, 3, 128, 128] show what their scene asks for, and how many in each criterion."""
    results = [score(video, scene) for video, scene in zip(videos, scenes)]
    right = {name: sum(result[name] for result in results) for name in CRITERIA}
    return f"{sum(all(result.values()) for result in results)}/{len(scenes)} right, {right}"


def load_pipeline(sampler: str, quant: str, weights: Path, lora: Path | None = None):
    """The embedded model, with a LoRA or without, quantized as the runners do it."""
    pipeline_class, checkpoint = SAMPLERS[sampler]
    config = ROOT / f"example/{sampler}/configs/{sampler}_demo.yaml"
    pipeline = pipeline_class(config, wan_base_model_path=weights / "Wan2.1-T2V-demo")
    pipeline.load_checkpoint(weights / checkpoint)
    if lora:
        pipeline.load_lora(lora)
    pipeline.setup_devices()
    if quant != "none":
        from dax.quant.quantization import qconfig, quantize_dynamic

        get_qconfig = getattr(qconfig, f"get_dynamic_{quant}_per_token_act_per_channel_weight_qconfig")
        qconfig_dict = {"": get_qconfig(), "condition_embedder": None, "proj_out": None}
        quantize_dynamic(pipeline.pipeline.generator.model, qconfig_dict)
    return pipeline


def score_prompts(pipeline, scenes: list[Scene], batch: int, seed: int) -> dict[str, float]:
    """Generate a clip of every scene's prompt; the percentage right in each criterion, and in all of them at once."""
    generator = torch.Generator(pipeline.device).manual_seed(seed)
    shape = pipeline.config.image_or_video_shape[1:]
    results = []
    for part in (scenes[i : i + batch] for i in range(0, len(scenes), batch)):
        noise = torch.randn(len(part), *shape, generator=generator, device=pipeline.device)
        videos = pipeline.pipeline.inference(noise, [scene.prompt for scene in part], generator=generator)
        results += [score(video, scene) for video, scene in zip(videos, part)]
    return percentages(results)


def score_rollouts(pipeline: CausVidPipeline, scenes: list[Scene], rollouts: int, seed: int) -> dict[str, float]:
    """The same for long videos of several rollouts, one prompt at a time."""
    generator = torch.Generator(pipeline.device).manual_seed(seed)
    videos = (pipeline.generate(scene.prompt, num_rollout=rollouts, generator=generator)[0] for scene in scenes)
    return percentages([score(video, scene) for video, scene in zip(videos, scenes)])


def percentages(results: list[dict[str, bool]]) -> dict[str, float]:
    right = {name: [result[name] for result in results] for name in CRITERIA}
    right["all four"] = [all(result.values()) for result in results]
    return {name: 100 * sum(values) / len(values) for name, values in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--quants", nargs="+", choices=QUANTS, default=list(QUANTS))
    parser.add_argument("--prompts", type=int, default=len(SCENES), help="score at most this many, evenly chosen")
    parser.add_argument("--long", type=int, default=12, help="of these, so many also as three CausVid rollouts")
    parser.add_argument("--batch", type=int, default=36)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=Path, default=ROOT / "weights/demo")
    parser.add_argument("--lora", type=Path, help="score the prompts that this LoRA teaches")
    args = parser.parse_args()
    torch.compiler.set_stance("force_eager")  # compiling takes longer than so few clips

    scenes = LORA_SCENES if args.lora else SCENES

    def evenly(count: int) -> list[Scene]:
        count = min(count, len(scenes))
        return [scenes[i * len(scenes) // count] for i in range(count)]

    names = [*CRITERIA, "all four"]
    print("| sampler | weights | prompts | " + " | ".join(names) + " |")
    print("|---|---|---|" + "---|" * len(names))

    def row(sampler: str, quant: str, scored: list[Scene], right: dict[str, float]) -> None:
        print(
            f"| {sampler} | {quant} | {len(scored)} | " + " | ".join(f"{right[name]:.1f}" for name in names) + " |",
            flush=True,
        )

    for sampler in args.samplers:
        for quant in args.quants:
            pipeline = load_pipeline(sampler, quant, args.weights, args.lora)
            scored = evenly(args.prompts)
            row(sampler, quant, scored, score_prompts(pipeline, scored, args.batch, args.seed))
            if sampler == "causvid" and args.long:
                scored = evenly(args.long)
                row("causvid, 3 rollouts", quant, scored, score_rollouts(pipeline, scored, 3, args.seed))


if __name__ == "__main__":
    main()
