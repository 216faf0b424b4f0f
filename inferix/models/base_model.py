"""The base model's folder: Wan's own layout (``Wan2.1-T2V-1.3B``) or diffusers' (``Wan2.1-T2V-1.3B-Diffusers``)."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5EncoderModel

from inferix.errors import InputError
from inferix.models.checkpoints import assign, load_sharded_safetensors, read_transformer, reading
from inferix.models.text_encoder import TextEncoder, load_tokenizer
from inferix.models.transformer import CausalWanTransformer, TransformerConfig
from inferix.models.vae import WanVAE


class BaseModel:
    """Loads the parts of a base model, each when it is asked for.

    Raises InputError where ``folder`` or a file in it is missing, damaged or of another kind.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise InputError(f"base model folder {folder} not found; weights/download.sh fetches Wan2.1-T2V-1.3B")
        self.diffusers = (self.folder / "transformer").is_dir()
        self.transformer_folder = self.folder / "transformer" if self.diffusers else self.folder
        self.config = TransformerConfig.from_json(self.transformer_folder / "config.json")

    def transformer(self) -> CausalWanTransformer:
        """The transformer with the base weights, memory-mapped."""
        with torch.device("meta"):
            model = CausalWanTransformer(self.config)
        state = load_sharded_safetensors(self.transformer_folder, "diffusion_pytorch_model")
        assign(model, read_transformer(state), self.transformer_folder)
        return model.eval().requires_grad_(False)

    def vae(self) -> WanVAE:
        if self.diffusers:
            with reading(self.folder / "vae"):
                return WanVAE(AutoencoderKLWan.from_pretrained(self.folder / "vae", local_files_only=True))
        return WanVAE.from_file(self.folder / "Wan2.1_VAE.pth")

    def text_encoder(self) -> TextEncoder:
        if self.diffusers:
            with reading(self.folder / "text_encoder"):
                model = UMT5EncoderModel.from_pretrained(self.folder / "text_encoder", local_files_only=True)
            return TextEncoder(model, load_tokenizer(self.folder / "tokenizer"), self.config.text_len)
        return TextEncoder.from_files(
            self.folder / "models_t5_umt5-xxl-enc-bf16.pth", self.folder / "google/umt5-xxl", self.config.text_len
        )
