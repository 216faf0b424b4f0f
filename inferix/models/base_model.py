"""The base model's folder: Wan's own layout (``Wan2.1-T2V-1.3B``) or diffusers' (``Wan2.1-T2V-1.3B-Diffusers``)."""

from pathlib import Path

import torch

from inferix.checkpoints.containers import infer_sizes, read_transformer
from inferix.checkpoints.files import load_sharded_safetensors, load_strict
from inferix.checkpoints.json_files import load_json
from inferix.errors import InputError
from inferix.models.config import TransformerConfig
from inferix.models.text_encoder import TextEncoder
from inferix.models.tiny_vae import TinyVAE
from inferix.models.transformer import CausalWanTransformer
from inferix.models.vae import VAE, WanVAE

TINY_VAE = "taew2_1.pth"


def empty_transformer(config: TransformerConfig) -> CausalWanTransformer:
    """Return a transformer on the meta device, to load weights into."""
    with torch.device("meta"):
        return CausalWanTransformer(config).eval().requires_grad_(False)


class WanCheckpoint:
    """The parts of a base model, each loaded when it is asked for.

    Args:
        folder: of either layout.
        transformer_weights: load the base's own transformer where it is there; False leaves the transformer on the meta
            device, to load a checkpoint into it.
        vae: ``full`` or ``tiny``.
        tiny_vae_path: file of the tiny VAE; None: ``taew2_1.pth`` in ``folder`` or beside it.

    Raises:
        InputError: if ``folder`` or a file in it is missing, damaged or of another kind.
    """

    def __init__(
        self,
        folder: str | Path,
        transformer_weights: bool = True,
        vae: str = "full",
        tiny_vae_path: str | Path | None = None,
    ):
        self.folder = Path(folder)
        if vae not in ("full", "tiny"):
            raise InputError(f"the VAE is full or tiny, not {vae!r}")
        self.vae_kind, self.tiny_vae_path = vae, tiny_vae_path
        self.transformer_weights = transformer_weights
        if not self.folder.is_dir():
            raise InputError(f"base model folder {folder} not found; weights/download.sh fetches Wan2.1-T2V-1.3B")
        self.diffusers = any((self.folder / part).is_dir() for part in ("transformer", "vae"))
        self.transformer_folder = self.folder / "transformer" if self.diffusers else self.folder
        self.has_transformer = any(self.transformer_folder.glob("diffusion_pytorch_model*"))
        self.has_config = (self.transformer_folder / "config.json").exists()
        """Whether ``config`` is known, from a file or from the weights; if not, it is the 1.3B model's until a checkpoint is loaded."""
        self.config = TransformerConfig()
        if self.has_config:
            self.config = TransformerConfig.from_json(self.transformer_folder / "config.json")

    def transformer(self) -> CausalWanTransformer:
        """Return the transformer with the base weights, memory-mapped, or without weights on the meta device."""
        if not self.transformer_weights or not self.has_transformer:
            return empty_transformer(self.config)
        state = read_transformer(load_sharded_safetensors(self.transformer_folder, "diffusion_pytorch_model"))
        if not self.has_config:
            self.config, self.has_config = TransformerConfig(**infer_sizes(state)), True
        model = empty_transformer(self.config)
        load_strict(model, state, self.transformer_folder)
        return model.requires_grad_(False)

    def vae(self) -> VAE:
        """Return the VAE, full or tiny."""
        if self.vae_kind == "tiny":
            return TinyVAE.from_file(self.find_tiny_vae())
        if not self.diffusers:
            return WanVAE.from_file(self.folder / "Wan2.1_VAE.pth")
        folder = self.folder / "vae"
        state, config = load_sharded_safetensors(folder, "diffusion_pytorch_model"), load_json(folder / "config.json")
        return WanVAE(state, config, folder)

    def find_tiny_vae(self) -> Path:
        """Return the tiny VAE's file. Raises InputError where there is none."""
        if self.tiny_vae_path is not None:
            return Path(self.tiny_vae_path)
        for path in (self.folder / TINY_VAE, self.folder.parent / TINY_VAE):
            if path.is_file():
                return path
        raise InputError(f"{self.folder.parent / TINY_VAE} not found; ./weights/download.sh tiny fetches it")

    def text_encoder(self) -> TextEncoder:
        if self.diffusers:
            return TextEncoder.from_diffusers(self.folder, self.config.text_len)
        weights, tokenizer = self.folder / "models_t5_umt5-xxl-enc-bf16.pth", self.folder / "google/umt5-xxl"
        return TextEncoder.from_files(weights, tokenizer, self.config.text_len)
