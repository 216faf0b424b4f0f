"""Can I trust the quantized video? The same prompts and seeds in full precision and in other settings, measured.

Writes tables (compare.md, compare.json), PSNR and SSIM of every frame (compare.png), relative error and gain of every block's
latents (compare_error.png), and for each setting the videos side by side (compare-SETTING.mp4, side_by_side.png).
``--sensitivity`` quantizes each group of modules alone instead, ranks them by the harm done, and suggests a file for the
runners' ``--qconfig``. ``--help`` lists the flags.
"""

import gc
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import launch
import quantization
from compare_report import (
    FRAMES_AT_ONCE,
    Clip,
    Figures,
    peak_bytes,
    plot_frames,
    report_text,
    reset_peak,
    save_picture,
    side_by_side,
)
from inferix import CausVidPipeline, SelfForcingPipeline
from inferix.cli.arguments import Parser, existing_path, positive
from inferix.cli.figures import plot_errors_by_block, write_report
from inferix.cli.main import run
from inferix.cli.model_paths import display_path, find_model_paths
from inferix.cli.prompts import example_prompts
from inferix.cli.report import common_prefixes, float_linear_names, format_bytes
from inferix.errors import InputError
from inferix.file_name import safe_file_name
from inferix.models.transformer import CausalWanTransformer
from inferix.pipelines.pipeline import Pipeline
from inferix.runtime.memory import num_bytes
from inferix.video import VideoWriter
from quantization import HIGH_PRECISION

MODELS = {
    "self_forcing": SelfForcingPipeline,
    "causvid": CausVidPipeline,
}


@dataclass(frozen=True)
class Setting:
    """What a clip is generated with."""

    name: str
    qconfig_dict: dict
    """As a file for ``--qconfig`` says it."""
    kv_cache_dtype: str = "auto"


PLOTTED_GROUPS = 10
"""So many groups of modules, those that suffer most, are drawn by ``--sensitivity``."""
FULL = Setting("full precision", {})
EVERYTHING = '""'
"""The default's key, as YAML writes it."""
FP8, INT8, E5M2 = "float8_e4m3fn", "int8", "float8_e5m2"
PER_TENSOR = {"weight_scheme": "per_tensor_symmetric", "activation_scheme": "per_tensor_symmetric"}
STATIC = {"activation_scheme": "per_tensor_symmetric", "static": True}


def known_settings(last_block: int = 0) -> dict[str, Setting]:
    """Return every setting with a name; all but the ``-all`` ones keep the two ends of the transformer in high precision."""
    outer = {"blocks.0": None, f"blocks.{last_block}": None}
    settings = [
        Setting("fp8", {"": "fp8", **HIGH_PRECISION}),
        Setting("int8", {"": "int8", **HIGH_PRECISION}),
        Setting("fp8-tensor", {"": {"dtype": FP8, **PER_TENSOR}, **HIGH_PRECISION}),
        Setting("int8-tensor", {"": {"dtype": INT8, **PER_TENSOR}, **HIGH_PRECISION}),
        Setting("int8-channel", {"": {"dtype": INT8, "activation_scheme": "per_tensor_symmetric"}, **HIGH_PRECISION}),
        Setting("fp8-static", {"": {"dtype": FP8, **PER_TENSOR, **STATIC}, **HIGH_PRECISION}),
        Setting("fp8-static-channel", {"": {"dtype": FP8, **STATIC}, **HIGH_PRECISION}),
        Setting("fp8-e5m2", {"": {"dtype": FP8, "activation_dtype": E5M2}, **HIGH_PRECISION}),
        Setting("fp8-outer", {"": "fp8", **outer, **HIGH_PRECISION}),
        Setting("int8-outer", {"": "int8", **outer, **HIGH_PRECISION}),
        Setting("fp8-rotation", {"": {"dtype": FP8, "rotation": True}, **HIGH_PRECISION}),
        Setting("int8-rotation", {"": {"dtype": INT8, "rotation": True}, **HIGH_PRECISION}),
        Setting("fp8-all", {"": "fp8"}),
        Setting("int8-all", {"": "int8"}),
        Setting("fp8kv", {}, "fp8"),
        Setting("fp8+fp8kv", {"": "fp8", **HIGH_PRECISION}, "fp8"),
        Setting("int8+fp8kv", {"": "int8", **HIGH_PRECISION}, "fp8"),
    ]
    return {setting.name: setting for setting in settings}


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    """Return the flags. Raises InputError for those that cannot work."""
    parser = Parser(description=__doc__.splitlines()[0])
    add, names = parser.add_argument, list(known_settings())
    add("--model", choices=MODELS, default="self_forcing", help="whose sampler and checkpoint (default: self_forcing)")
    add("--checkpoint_path", type=existing_path, help="Self-Forcing's file, or CausVid's folder")
    parser.add_switch("--use_ema", default=True, help="Self-Forcing: load the averaged weights (default: true)")
    add("--settings", nargs="+", default=names, help=f"names, or YAML files as for --qconfig; all: {' '.join(names)}")
    add("--num_prompts", type=positive, default=4, help="without --prompt: so many that the model knows (default: 4)")
    add("--num_output_frames", type=positive, help="latent frames of a clip (default: the config's)")
    add(
        "--sensitivity",
        choices=("fp8", "int8"),
        nargs="?",
        const="fp8",
        help="rank the modules by the harm of quantizing each alone (to fp8, if nothing is said)",
    )
    add("--psnr", type=float, default=35.0, help="dB that the qconfig which --sensitivity suggests is to reach (35)")
    args = parser.parse_args(argv)
    args.output_folder = args.output_folder or Path(launch.ROOT) / "outputs/compare"
    if unknown := [name for name in args.settings if name not in names and not Path(name).is_file()]:
        parser.error(f"--settings: {unknown[0]} is neither a name nor a file")
    return args


def load(args: Namespace) -> Pipeline:
    """Return the pipeline in full precision, its transformer still where the checkpoint file is mapped."""
    paths = find_model_paths(args)
    pipeline = MODELS[args.model](paths.config, args.default_config_path, paths.base)
    pipeline.load_checkpoint(paths.checkpoint, use_ema=args.use_ema and args.model == "self_forcing")
    return pipeline


class Comparison:
    """Clips of the same prompts and seeds, first with the transformer as it was loaded, then in other settings."""

    def __init__(self, pipeline: Pipeline, prompts: list[str], seed: int, num_frames: int | None):
        self.pipeline, self.prompts, self.seed, self.num_frames = pipeline, prompts, seed, num_frames
        self.parts = pipeline.pipeline
        self.weights = pipeline.transformer.state_dict()
        pipeline.setup_devices()
        self.reference: list[Clip] = []
        self.compiled = True

    def apply(self, setting: Setting) -> None:
        """Put a transformer of this setting into the pipeline."""
        with torch.device("meta"):
            model = CausalWanTransformer(self.pipeline.transformer.config)
        model.load_state_dict(self.weights, assign=True)
        # the old model and its graphs go before the new ones take as much memory again
        self.parts.generator.model = self.parts.kv_cache = None
        self.parts.generator.encoder_kv = []
        torch.compiler.reset()  # or the many settings would exceed what it keeps of one function
        gc.collect()
        self.parts.generator.model = model.eval().requires_grad_(False).to(self.pipeline.device, self.pipeline.dtype)
        self.parts.set_kv_cache_dtype(setting.kv_cache_dtype)
        if setting.qconfig_dict:
            qconfig_dict = quantization.parse_qconfig_dict(setting.qconfig_dict, setting.name)
            quantization.quantize_with(self.pipeline, qconfig_dict, self.prompts[:4])
        if self.pipeline.device.type == "cuda" and self.compiled:
            model.compile_repeated_blocks()
            self.clip(0)  # which compiles

    def clip(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the video [T, 3, H, W] and the latents [F, 16, h, w] made of one of the prompts."""
        seed = (self.seed + number) % 2**63
        made = quantization.generate_clip(self.pipeline, self.prompts[number], seed, self.num_frames)
        return made[0][0], made[1][0].float()

    def measure(self, setting: Setting, show: Callable[[Tensor, Tensor], None] | None = None) -> Figures:
        """Make every clip and compare it with the reference, which has to be made first: ``measure(FULL)``.

        ``show`` is called with the reference's and the setting's video of each.
        """
        self.apply(setting)
        figures = Figures(setting.name, weight_bytes=num_bytes(self.pipeline.transformer))
        for number in range(len(self.prompts)):
            reset_peak()
            start = time.perf_counter()
            made = Clip(*(tensor.cpu() for tensor in self.clip(number)))
            figures.seconds.append(time.perf_counter() - start)
            figures.peak_bytes = max(figures.peak_bytes, peak_bytes())
            if setting == FULL:
                self.reference.append(made)
            else:
                block_size = self.pipeline.config.num_frame_per_block
                figures.add(self.reference[number], made, block_size, self.pipeline.device)
            if show:
                show(self.reference[number].video, made.video)
        return figures


def compare(comparison: Comparison, settings: list[Setting], folder: Path) -> None:
    """Print and write the tables, the plots and the videos."""
    results, pictures = [comparison.measure(FULL)], {}
    for setting in settings:
        with VideoWriter(folder / f"compare-{safe_file_name(setting.name)}.mp4") as writer:

            def show(reference: Tensor, video: Tensor) -> None:
                for frames in zip(reference.split(FRAMES_AT_ONCE), video.split(FRAMES_AT_ONCE)):
                    panels = side_by_side(*frames, setting.name)
                    writer.write(panels)
                pictures.setdefault(setting.name, panels[-1].clone())

            results.append(comparison.measure(setting, show))
        print(results[-1].line(), flush=True)
    print(f"\n{report_text(results)}")
    write(folder, "compare", comparison, results, results[1:])
    plot_frames(results[1:], folder / "compare.png")
    save_picture(torch.cat(list(pictures.values()), dim=1), folder / "side_by_side.png")


def sensitivity(comparison: Comparison, kind: str, wanted: float, folder: Path) -> None:
    """Quantize each group of modules alone, and suggest which of them to keep as they are."""
    comparison.compiled = False  # it would take longer than so few clips
    full_size = comparison.measure(FULL).weight_bytes
    linears = float_linear_names(comparison.pipeline.transformer)
    alone = []
    for group in dict.fromkeys(group_of(name) for name in linears):
        alone.append(comparison.measure(Setting(group, {group: kind})))
        print(alone[-1].line(), flush=True)
    alone.sort(key=lambda figures: figures.mse / (full_size - figures.weight_bytes), reverse=True)
    print(
        f"\nEach group alone in {kind}, the most harm for the memory it saves first:\n\n{report_text(alone)}\n",
        flush=True,
    )
    write(folder, "sensitivity", comparison, alone, alone[:PLOTTED_GROUPS])

    ranked = [[name for name in linears if group_of(name) == figures.setting] for figures in alone]
    figures, suggestion = search_min_kept(comparison, kind, wanted, ranked)
    size = f"{format_bytes(figures.weight_bytes)} of weights instead of {format_bytes(full_size)}"
    lines = [f"# {kind}: PSNR {figures.psnr:.1f} dB, {size}"]
    lines += [f"{name or EVERYTHING}: {value or 'null'}" for name, value in suggestion.qconfig_dict.items()]
    text = "\n".join(lines) + "\n"
    (folder / "suggested.yaml").write_text(text)
    print(
        f"\nSuggested for {wanted:g} dB; saved as {display_path(folder / 'suggested.yaml')} for QCONFIG:\n\n{text}",
        end="",
    )


def search_min_kept(
    comparison: Comparison, kind: str, wanted: float, ranked: list[list[str]]
) -> tuple[Figures, Setting]:
    """Return the fewest groups of Linears, from the front of ``ranked``, to keep for the PSNR wanted: found by bisection.

    Raises InputError where it takes all of them.
    """
    few, many, found = 0, len(ranked), None
    while few < many:
        middle = (few + many) // 2
        kept = common_prefixes(sum(ranked[:middle], []), sum(ranked, []))
        setting = Setting(f"{middle} groups kept", {"": kind, **dict.fromkeys(kept)})
        figures = comparison.measure(setting)
        print(figures.line(), flush=True)
        if figures.psnr >= wanted:
            many, found = middle, (figures, setting)
        else:
            few = middle + 1
    if found is None:
        raise InputError(
            f"a single group in {kind} takes the PSNR below {wanted:g} dB: lower --psnr, or take the other type"
        )
    return found


def group_of(name: str) -> str:
    """Return the group that a Linear is ranked in: each part of each block, and what is outside of them by its first name."""
    return ".".join(name.split(".")[: 3 if name.startswith("blocks.") else 1])


def write(folder: Path, stem: str, comparison: Comparison, results: list[Figures], plotted: list[Figures]) -> None:
    """Write the tables, all figures and what they were taken on as JSON, and the plot of errors by block."""
    report = {"dtype": str(comparison.pipeline.dtype), "seed": comparison.seed, "prompts": comparison.prompts}
    write_report(folder / f"{stem}.json", report | {"settings": [asdict(figures) for figures in results]})
    (folder / f"{stem}.md").write_text(report_text(results) + "\n")
    errors = {figures.setting: figures.error_by_block() for figures in plotted}
    gains = {figures.setting: figures.gain_by_block() for figures in plotted}
    plot_errors_by_block(errors, gains, folder / f"{stem}_error.png")


def main(argv: list[str] | None = None) -> None:
    """Compare what the flags describe. Raises InputError for flags that cannot work."""
    args = parse_arguments(argv)
    files = {name: quantization.read_yaml(Path(name)) for name in args.settings if name not in known_settings()}
    for name, content in files.items():
        quantization.parse_qconfig_dict(content, name)  # refused before anything is made
    pipeline = load(args)
    known = known_settings(pipeline.transformer.config.num_layers - 1)
    settings = [known.get(name) or Setting(Path(name).stem, files[name]) for name in args.settings]
    prompts = args.prompts or example_prompts(pipeline.config, args.num_prompts)
    try:
        args.output_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {args.output_folder}: {error.strerror}; choose another folder") from None
    comparison = Comparison(pipeline, prompts, args.seed, args.num_output_frames)
    if args.sensitivity:
        sensitivity(comparison, args.sensitivity, args.psnr, args.output_folder)
    else:
        compare(comparison, settings, args.output_folder)


if __name__ == "__main__":
    raise SystemExit(run(main))
