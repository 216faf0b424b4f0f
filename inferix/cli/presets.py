"""Published causal models by name: their files, where these lie under ``weights/``, and their configs.

Needs nothing but Python, so that ``weights/download.sh`` can read the table before anything is installed.
"""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from inferix.errors import InputError
from inferix.models.config import TransformerConfig

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "weights"


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hugging Face Hub, or at ``url``, and its place under ``weights/``."""

    repo: str
    name: str
    """Path in the repository."""
    folder: str
    """Below ``weights/``; the path in the repository follows."""
    gigabytes: float = 0.0
    """Rounded; 0: small."""
    url: str | None = None
    """Where it is not on the Hub."""

    def path(self, weights: Path = WEIGHTS) -> Path:
        """Return where the file lies, or will lie."""
        return either_spelling(weights / self.folder / self.name)


def base_files(repo: str, folder: str) -> list[RemoteFile]:
    """Return what is needed of a base model: all but its transformer, whose place a checkpoint takes."""
    tokenizer = ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json")
    sizes = {"config.json": 0.0, "models_t5_umt5-xxl-enc-bf16.pth": 11.4, "Wan2.1_VAE.pth": 0.5}
    sizes |= {f"google/umt5-xxl/{name}": 0.0 for name in tokenizer}
    return [RemoteFile(repo, name, folder, size) for name, size in sizes.items()]


BASES = {
    "Wan2.1-T2V-1.3B": base_files("Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1-T2V-1.3B"),
    "Wan2.1-T2V-14B": base_files("Wan-AI/Wan2.1-T2V-14B", "Wan2.1-T2V-14B"),
}
GEOMETRIES = {
    "1.3B": TransformerConfig(),
    "14B": TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
}
TINY_VAE = RemoteFile(
    "madebyollin/taehv", "taew2_1.pth", "", 0.02, "https://github.com/madebyollin/taehv/raw/main/taew2_1.pth"
)


@dataclass(frozen=True)
class Preset:
    """A published model and how it is sampled."""

    script: str
    """``self_forcing`` or ``causvid``: which of the two scripts runs it."""
    config: str
    """Below ``example/``."""
    checkpoint: RemoteFile
    lora: RemoteFile | None = None
    use_ema: bool = False
    size: str = "1.3B"
    licence: str = "see its page"

    @property
    def base(self) -> str:
        """Name of the base model's folder under ``weights/``."""
        return f"Wan2.1-T2V-{self.size}"

    @property
    def checkpoint_path(self) -> Path:
        """The checkpoint; where all are called model.pt, its folder, which has the name that tells them apart."""
        path = self.checkpoint.path()
        return path.parent if path.name == "model.pt" else path

    @property
    def config_path(self) -> Path:
        return ROOT / "example" / self.config

    def files(self) -> list[RemoteFile]:
        """Return all files that it needs."""
        return [*BASES[self.base], self.checkpoint, *([self.lora] if self.lora else [])]


NON_COMMERCIAL = "CC BY-NC-SA 4.0"
SELF_FORCING = ("gdhe17/Self-Forcing", "self_forcing")
CAUSVID = ("tianweiy/CausVid", "causvid")
CAUSAL_FORCING = ("zhuhz22/Causal-Forcing", "causal_forcing")
LONGLIVE = ("Efficient-Large-Model/LongLive-1.3B", "longlive")


def _file(source: tuple[str, str], name: str, gigabytes: float) -> RemoteFile:
    repo, folder = source
    return RemoteFile(repo, name, folder, gigabytes)


def _causal_forcing(name: str, config: str, use_ema: bool = True) -> Preset:
    path = f"causal_forcing/configs/causal_forcing_{config}.yaml"
    checkpoint = _file(CAUSAL_FORCING, name, 5.7)
    return Preset("self_forcing", path, checkpoint, use_ema=use_ema, licence="Apache-2.0")


PRESETS = {
    "self_forcing": Preset(
        "self_forcing",
        "self_forcing/configs/self_forcing_dmd.yaml",
        _file(SELF_FORCING, "checkpoints/self_forcing_dmd.pt", 5.7),
        use_ema=True,
        licence=NON_COMMERCIAL,
    ),
    "self_forcing_sid": Preset(
        "self_forcing",
        "self_forcing/configs/self_forcing_dmd.yaml",  # the sampler is the same
        _file(SELF_FORCING, "checkpoints/self_forcing_sid.pt", 5.7),
        use_ema=True,
        licence=NON_COMMERCIAL,
    ),
    "causvid": Preset(
        "causvid",
        "causvid/configs/causvid.yaml",
        _file(CAUSVID, "autoregressive_checkpoint/model.pt", 11.4),
        licence=NON_COMMERCIAL,
    ),
    "causvid_4step": Preset(
        "causvid",
        "causvid/configs/causvid_4step.yaml",
        _file(CAUSVID, "autoregressive_checkpoint_warp_4step_cfg2/model.pt", 11.4),
        licence=NON_COMMERCIAL,
    ),
    "causal_forcing": _causal_forcing("chunkwise/causal_forcing.pt", "chunkwise", use_ema=False),
    "causal_forcing_framewise": _causal_forcing("framewise/causal_forcing.pt", "framewise"),
    "causal_forcing_framewise_2step": _causal_forcing("causal-forcing++/framewise-2step.pt", "framewise_2step"),
    "causal_forcing_framewise_1step": _causal_forcing("causal-forcing++/framewise-1step.pt", "framewise_1step"),
    "longlive": Preset(
        "self_forcing",
        "longlive/configs/longlive.yaml",
        _file(LONGLIVE, "models/longlive_base.pt", 5.7),
        lora=_file(LONGLIVE, "models/lora.pt", 2.8),
    ),
    "causvid_14b": Preset(
        "causvid",
        "causvid/configs/causvid_14b.yaml",
        _file(("lightx2v/Wan2.1-T2V-14B-CausVid", "causvid_14b"), "causal_model.pt", 28.6),
        size="14B",
    ),
    "krea_14b": Preset(
        "self_forcing",
        "krea/configs/krea_14b.yaml",
        _file(("krea/krea-realtime-video", "krea"), "krea-realtime-video-14b.safetensors", 28.6),
        size="14B",
    ),
}
DOWNLOADS = {"base": BASES["Wan2.1-T2V-1.3B"], "base_14b": BASES["Wan2.1-T2V-14B"], "tiny": [TINY_VAE]}
DOWNLOADS |= {name: preset.files() for name, preset in PRESETS.items()}
"""What ``weights/download.sh NAME`` fetches."""


def either_spelling(path: Path) -> Path:
    """Return ``path``, with ``causvid`` spelled as on disk: upstream's guide and its checkpoint's repository differ."""
    if path.exists():
        return path
    for one, other in (("causvid", "CausVid"), ("CausVid", "causvid")):
        respelled = Path(*(other if part == one else part for part in path.parts))
        if respelled != path and respelled.exists():
            return respelled
    return path


def apply_preset(args: Namespace, weights_flag: str) -> None:
    """Set config, base, checkpoint and LoRA to those of ``args.preset``, but for those that are set already.

    Args:
        weights_flag: which of the runner's flags names the checkpoint.

    Raises InputError where the preset is another script's, or a file of it is not there.
    """
    preset = PRESETS[args.preset]
    if preset.script != args.model:
        raise InputError(f"{args.preset} is a preset of {preset.script}_quantized.sh; PRESET=list lists them all")
    needed: list[Path] = []

    def default(flag: str, value: object, files: list[RemoteFile]) -> None:
        if getattr(args, flag, None) is None:
            setattr(args, flag, value)
            needed.extend(file.path() for file in files if file.gigabytes)

    default("config_path", preset.config_path, [])
    base = WEIGHTS / preset.base
    default("wan_base_model_path", base, [] if (base / "vae").is_dir() else BASES[preset.base])  # diffusers' layout
    default("use_ema", preset.use_ema, [])
    if not args.load_quantized:
        default(weights_flag, preset.checkpoint_path, [preset.checkpoint])
        if preset.lora:
            default("lora_path", [(preset.lora.path(), 1.0)], [preset.lora])
    if missing := [path for path in needed if not path.exists()]:
        fetch = f"./weights/download.sh {args.preset}"
        raise InputError(f"PRESET={args.preset}: {missing[0].relative_to(ROOT)} not found; {fetch} fetches it")


def parameter_counts(config: TransformerConfig) -> tuple[int, int, int]:
    """Return a transformer's parameters: weights of its blocks' Linears, their output channels, and all others."""
    dim, ffn, blocks = config.dim, config.ffn_dim, config.num_layers
    weights = blocks * (8 * dim * dim + 2 * dim * ffn)  # q, k, v, o of both attentions; the feed-forward
    channels = blocks * (9 * dim + ffn)
    block_rest = channels + blocks * (4 * dim + 2 * dim + 6 * dim)  # biases; q/k norms, norm2, modulation
    embedders = dim * (config.freq_dim + dim + config.text_dim + dim + 6 * dim) + 10 * dim
    ends = dim * 4 * (config.in_dim + config.out_dim) + dim + 4 * config.out_dim + 2 * dim
    return weights, channels, block_rest + embedders + ends


def weight_gigabytes(config: TransformerConfig) -> tuple[float, float]:
    """Return GB of a transformer's weights in bfloat16, and with its blocks' Linears in 8 bits, scales per channel."""
    weights, channels, others = parameter_counts(config)
    return 2 * (weights + others) / 1e9, (weights + 4 * channels + 2 * others) / 1e9


def preset_table() -> str:
    """Return the presets as a table, one a line: what ``PRESET=list`` prints."""
    from inferix.config import load_config  # needs OmegaConf, which download.sh may not have

    header = ("preset", "script", "size", "steps", "frames a block", "GB bf16", "GB 8 bits", "licence", "on the Hub")
    rows: list[tuple[str, ...]] = [header]
    for name, preset in PRESETS.items():
        config, checkpoint = load_config(preset.config_path), preset.checkpoint
        steps, first = (len(s or ()) for s in (config.denoising_step_list, config.denoising_step_list_first_chunk))
        sizes = (f"{size:.1f}" for size in weight_gigabytes(GEOMETRIES[preset.size]))
        number = f"{steps}, first block {first}" if first else str(steps)
        files = f"{checkpoint.repo} {checkpoint.name}" + (f" + {preset.lora.name}" if preset.lora else "")
        rows.append(
            (name, preset.script, preset.size, number, str(config.num_frame_per_block), *sizes, preset.licence, files)
        )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    return "\n".join(lines)
