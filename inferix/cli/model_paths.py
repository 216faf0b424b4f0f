"""Where a model is: its config, its base model and its checkpoint."""

from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from glob import glob
from pathlib import Path

from inferix.cli.presets import PRESETS, ROOT, TINY_VAE, WEIGHTS, either_spelling
from inferix.config import PipelineConfig, load_config, with_size
from inferix.errors import InputError


@dataclass(frozen=True)
class ModelPaths:
    """Three paths that belong together: a checkpoint fits one base model, and a config the two."""

    config: Path
    base: Path
    checkpoint: Path


REAL = {
    name: ModelPaths(PRESETS[name].config_path, WEIGHTS / PRESETS[name].base, PRESETS[name].checkpoint_path)
    for name in ("self_forcing", "causvid")
}
DEMO = {
    "self_forcing": ModelPaths(
        config=ROOT / "example/self_forcing/configs/self_forcing_demo.yaml",
        base=ROOT / "weights/demo/Wan2.1-T2V-demo",
        checkpoint=ROOT / "weights/demo/self_forcing/checkpoints/self_forcing_dmd.pt",
    ),
    "causvid": ModelPaths(
        config=ROOT / "example/causvid/configs/causvid_demo.yaml",
        base=ROOT / "weights/demo/Wan2.1-T2V-demo",
        checkpoint=ROOT / "weights/demo/CausVid/autoregressive_checkpoint",
    ),
}


def find_model_paths(args: Namespace) -> ModelPaths:
    """Return ``resolve_model_paths``, and print a line for each thing about them that a user may not expect."""
    paths, notes = resolve_model_paths(args)
    if getattr(args, "enable_webrtc", False) and args.vae == "tiny" and not has_gpu():
        notes.append("decoding with the tiny VAE, as there is no GPU (VAE=full: exact, but slower than playback)")
    for note in notes:
        print(note)
    return paths


def resolve_model_paths(args: Namespace) -> tuple[ModelPaths, list[str]]:
    """Return the paths that the flags name, completed by defaults, and what to say about them.

    The defaults are the public weights; the demo model's where a flag names a part of it, or where no flag is given and
    the public weights are not there. ``--load_quantized`` takes the place of the checkpoint.

    Raises InputError where a default that the flags need does not exist.
    """
    checkpoint_flag = "checkpoint_folder" if "checkpoint_folder" in args else "checkpoint_path"
    flags = {"config": "config_path", "base": "wan_base_model_path", "checkpoint": checkpoint_flag}
    given = {part: path for part, flag in flags.items() if (path := getattr(args, flag)) is not None}
    real, demo = REAL[args.model], DEMO[args.model]
    real = replace(real, checkpoint=either_spelling(real.checkpoint))
    if saved := getattr(args, "load_quantized", None):
        real, demo = replace(real, checkpoint=saved), replace(demo, checkpoint=saved)
    names_demo = any(path.resolve() == getattr(demo, part) for part, path in given.items())
    paths = replace(demo if names_demo else real, **given)
    missing = [part for part, path in asdict(paths).items() if not path.exists()]
    if not missing:
        return paths, size_notes(args, paths)
    part, path = missing[0], display_path(getattr(paths, missing[0]))
    if given:
        others, flag = " and ".join(flags[part].upper() for part in given), flags[part]
        raise InputError(
            f"{path} not found: it is the default that belongs to the {others} you set; set {flag.upper()} (--{flag}) "
            "too, or fetch it with weights/download.sh"
        )
    if not all(path.exists() for path in asdict(demo).values()):
        raise InputError(f"{path} not found: weights/download.sh fetches the public weights")
    return demo, [f"{path} not found (weights/download.sh fetches it): using the small demo model in weights/demo"]


def find_config(args: Namespace, paths: ModelPaths) -> PipelineConfig:
    """Return the config with what the flags change in it. Raises InputError where it cannot be used."""
    return with_size(load_config(paths.config, args.default_config_path), args.height, args.width)


def find_tiny_vae(args: Namespace, paths: ModelPaths) -> Path | None:
    """Return the file of the tiny VAE that ``--vae tiny`` needs, None without it. Raises InputError where it is not there."""
    if args.vae != "tiny" or args.tiny_vae_path:
        return args.tiny_vae_path
    candidates = tiny_vae_candidates(args, paths)
    for path in candidates:
        if path.is_file():
            return path
    if TINY_VAE.path() in candidates:
        raise InputError(f"{display_path(TINY_VAE.path())} not found: ./weights/download.sh tiny fetches it")
    raise InputError(f"{display_path(candidates[0])} not found: set TINY_VAE_PATH (--tiny_vae_path)")


def tiny_vae_candidates(args: Namespace, paths: ModelPaths) -> list[Path]:
    """Return where the base model's tiny VAE may be, most specific first."""
    beside = [paths.base / TINY_VAE.name, paths.base.parent / TINY_VAE.name]
    # The demo model's latents are its own: the public file does not decode them.
    return beside if paths.base.resolve() == DEMO[args.model].base else [*beside, TINY_VAE.path()]


def default_vae(args: Namespace, paths: ModelPaths) -> str:
    """Return what decodes where no flag says it: the full VAE, but for the page without a GPU the tiny one, if it is there.

    On a CPU the full VAE is slower than playback.
    """
    live = args.enable_webrtc and not getattr(args, "i2v", False) and not has_gpu()
    return "tiny" if live and any(path.is_file() for path in tiny_vae_candidates(args, paths)) else "full"


def has_gpu() -> bool:
    """Return whether the system shows a GPU; PyTorch, which would know it for sure, takes seconds to import."""
    return bool(glob("/dev/nvidia[0-9]*")) or Path("/dev/dxg").exists()  # dxg: under WSL


def size_notes(args: Namespace, paths: ModelPaths) -> list[str]:
    """Return a note where another size is asked for than a model that we know was made for."""
    for known in (REAL[args.model], DEMO[args.model]):
        if known.base.resolve() == paths.base.resolve() and known.config.exists():
            made_for, asked = frame_size(load_config(known.config)), frame_size(find_config(args, paths))
            if made_for != asked:
                return [f"note: {display_path(paths.base)} was made for {made_for}, not {asked}: expect a poor picture"]
    return []


def frame_size(config: PipelineConfig) -> str:
    """Return the frames' size, as ``832x480``."""
    height, width = (8 * size for size in config.image_or_video_shape[-2:])
    return f"{width}x{height}"


def display_path(path: Path) -> str:
    """Return ``path`` relative to the current folder where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
