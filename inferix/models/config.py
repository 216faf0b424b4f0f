"""Sizes of the transformer."""

import json
from dataclasses import dataclass
from pathlib import Path

from inferix.errors import InputError


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the network; the defaults are Wan2.1-T2V-1.3B's."""

    dim: int = 1536
    ffn_dim: int = 8960
    freq_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    text_dim: int = 4096
    text_len: int = 512
    """Tokens a prompt is padded to."""
    in_dim: int = 16
    out_dim: int = 16
    num_heads: int = 12
    num_layers: int = 30
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def from_json(cls, path: Path) -> "TransformerConfig":
        """Read a ``config.json`` of the original ``WanModel`` or of diffusers' ``WanTransformer3DModel``.

        Raises InputError where the file is missing, is not JSON or describes another kind of model.
        """
        try:
            raw = dict(json.loads(Path(path).read_text()))
        except FileNotFoundError:
            raise InputError(f"{path} not found: it describes the base model's sizes; see weights/README.md") from None
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} is not a valid JSON object ({error}); download it again") from None
        if "num_attention_heads" in raw:  # diffusers' names
            raw |= {
                "num_heads": raw["num_attention_heads"],
                "dim": raw["num_attention_heads"] * raw["attention_head_dim"],
                "in_dim": raw["in_channels"],
                "out_dim": raw["out_channels"],
            }
        missing = {"dim", "ffn_dim", "num_heads", "num_layers"} - raw.keys()
        if missing:
            raise InputError(f"{path} has no {', '.join(sorted(missing))}: it is not the config of a Wan transformer")
        sizes = {name: raw[name] for name in cls.__dataclass_fields__ if name in raw}
        if not all(isinstance(size, int | float) and size > 0 for size in sizes.values()):
            raise InputError(f"{path} has a size that is no positive number; download it again")
        return cls(**sizes)
