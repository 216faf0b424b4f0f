"""Where a model is: its config, its base model and its checkpoint."""

from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from inferix.cli.arguments import either_spelling
from inferix.config import load_config
from inferix.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class ModelPaths:
    """Three paths that belong together: a checkpoint fits one base model, and a config the two."""

    config: Path | None
    base: Path | None
    checkpoint: Path | None


REAL = {
    "self_forcing": ModelPaths(
        config=ROOT / "example/self_forcing/configs/self_forcing_dmd.yaml",
        base=ROOT / "weights/Wan2.1-T2V-1.3B",
        checkpoint=ROOT / "weights/self_forcing/checkpoints/self_forcing_dmd.pt",
    ),
    "causvid": ModelPaths(
        config=ROOT / "example/causvid/configs/causvid.yaml",
        base=ROOT / "weights/Wan2.1-T2V-1.3B",
        checkpoint=ROOT / "weights/causvid/autoregressive_checkpoint",
    ),
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


def size_notes(args: Namespace, paths: ModelPaths) -> list[str]:
    """Return a note where the config asks for another size than a model that we know was made for."""
    for known in (REAL[args.model], DEMO[args.model]):
        if known.base.resolve() == paths.base.resolve() and known.config.exists():
            made_for, asked = (frame_size(path) for path in (known.config, paths.config))
            if made_for != asked:
                return [
                    f"note: {display_path(paths.base)} was made for {made_for}, {display_path(paths.config)} asks for "
                    f"{asked}: expect a poor picture (--config_path {display_path(known.config)})"
                ]
    return []


def frame_size(config: Path) -> str:
    """Return the frames' size, as ``832x480``, that a config asks for."""
    height, width = (8 * size for size in load_config(config).image_or_video_shape[-2:])
    return f"{width}x{height}"


def display_path(path: Path) -> str:
    """Return ``path`` relative to the current folder where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
