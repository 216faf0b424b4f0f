"""The base model's folder: Wan's own layout (``Wan2.1-T2V-1.3B``) or diffusers' (``Wan2.1-T2V-1.3B-Diffusers``)."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from inferix.errors import InputError
from inferix.models.checkpoints import assign, load_sharded_safetensors, read_transformer, reading
from inferix.models.text_encoder import TextEncoder
from inferix.models.config import TransformerConfig
from inferix.models.transformer import CausalWanTransformer
from inferix.models.vae import WanVAE


class WanCheckpoint:
    """The parts of a base model, each loaded when it is asked for.

    Args:
        folder: of either layout.
        transformer_weights: False leaves the transformer on the meta device, to load other weights into it; the base's own
            need not be there.

    Raises:
        InputError: if ``folder`` or a file in it is missing, damaged or of another kind.
    """

    def __init__(self, folder: str | Path, transformer_weights: bool = True):
        self.folder = Path(folder)
        self.transformer_weights = transformer_weights
        if not self.folder.is_dir():
            raise InputError(f"base model folder {folder} not found; weights/download.sh fetches Wan2.1-T2V-1.3B")
        self.diffusers = (self.folder / "transformer").is_dir()
        self.transformer_folder = self.folder / "transformer" if self.diffusers else self.folder
        self.config = TransformerConfig.from_json(self.transformer_folder / "config.json")

    def transformer(self) -> CausalWanTransformer:
        """Return the transformer with the base weights, memory-mapped, or on the meta device."""
        with torch.device("meta"):
            model = CausalWanTransformer(self.config)
        if self.transformer_weights:
            state = load_sharded_safetensors(self.transformer_folder, "diffusion_pytorch_model")
            assign(model, read_transformer(state), self.transformer_folder)
        return model.eval().requires_grad_(False)

    def vae(self) -> WanVAE:
        if not self.diffusers:
            return WanVAE.from_file(self.folder / "Wan2.1_VAE.pth")
        folder = self.folder / "vae"
        with reading(folder / "config.json"):
            config = AutoencoderKLWan.load_config(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoencoderKLWan.from_config(config)
        assign(model, load_sharded_safetensors(folder, "diffusion_pytorch_model"), folder)
        return WanVAE(model)

    def text_encoder(self) -> TextEncoder:
        if self.diffusers:
            return TextEncoder.from_diffusers(self.folder, self.config.text_len)
        weights, tokenizer = self.folder / "models_t5_umt5-xxl-enc-bf16.pth", self.folder / "google/umt5-xxl"
        return TextEncoder.from_files(weights, tokenizer, self.config.text_len)
