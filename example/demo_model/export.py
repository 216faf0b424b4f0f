"""Writes the trained parts in the file layout, and under the key names, of the public checkpoints."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from inferix.models.transformer import CausalWanTransformer
from text import SPECIAL

BASE = "Wan2.1-T2V-demo"
SELF_FORCING = "self_forcing/checkpoints/self_forcing_dmd.pt"
CAUSVID = "CausVid/autoregressive_checkpoint/model.pt"

TRANSFORMER_NAMES = {
    r"^condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"^condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"^condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"^condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"^condition_embedder\.time_proj": "time_projection.1",
    r"^scale_shift_table": "head.modulation",
    r"^proj_out": "head.head",
    r"\.scale_shift_table": ".modulation",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_out\.0\.": ".o.",
    r"\.to_([qkv])\.": r".\1.",
    r"\.ffn\.net\.0\.proj": ".ffn.0",
    r"\.ffn\.net\.2": ".ffn.2",
    r"\.norm2\.": ".norm3.",
}
RESNET_NAMES = {
    r"\.norm1\.": ".residual.0.",
    r"\.conv1\.": ".residual.2.",
    r"\.norm2\.": ".residual.3.",
    r"\.conv2\.": ".residual.6.",
    r"\.conv_shortcut\.": ".shortcut.",
}
VAE_NAMES = {
    **{rf"(resnets|down_blocks)(.*){name}": rf"\1\2{new}" for name, new in RESNET_NAMES.items()},
    r"^quant_conv": "conv1",
    r"^post_quant_conv": "conv2",
    r"\.conv_in\.": ".conv1.",
    r"\.norm_out\.": ".head.0.",
    r"\.conv_out\.": ".head.2.",
    r"\.mid_block\.resnets\.0": ".middle.0",
    r"\.mid_block\.attentions\.0": ".middle.1",
    r"\.mid_block\.resnets\.1": ".middle.2",
    r"\.down_blocks\.": ".downsamples.",
}
TEXT_NAMES = {
    r"^shared\.": "token_embedding.",
    r"^encoder\.final_layer_norm\.": "norm.",
    r"^encoder\.block\.(\d+)\.": r"blocks.\1.",
    r"\.layer\.0\.layer_norm\.": ".norm1.",
    r"\.layer\.1\.layer_norm\.": ".norm2.",
    r"\.layer\.0\.SelfAttention\.relative_attention_bias\.": ".pos_embedding.embedding.",
    r"\.layer\.0\.SelfAttention\.": ".attn.",
    r"\.layer\.1\.DenseReluDense\.wi_0\.": ".ffn.gate.0.",
    r"\.layer\.1\.DenseReluDense\.wi_1\.": ".ffn.fc1.",
    r"\.layer\.1\.DenseReluDense\.wo\.": ".ffn.fc2.",
}


def original_state(module: nn.Module, names: dict[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The module's weights under the original names."""
    state = {}
    for key, tensor in module.state_dict().items():
        for pattern, replacement in names.items():
            key = re.sub(pattern, replacement, key)
        # the decoder's blocks of three residual blocks and one upsampler are numbered through
        key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", key)
        state[key] = tensor.detach().to("cpu", dtype).contiguous()
    return state


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def export_vae(vae: AutoencoderKLWan, folder: Path) -> None:
    (folder / BASE).mkdir(parents=True, exist_ok=True)
    torch.save(original_state(vae, VAE_NAMES, torch.bfloat16), folder / BASE / "Wan2.1_VAE.pth")


def export_text_encoder(encoder: UMT5EncoderModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    state = original_state(encoder, TEXT_NAMES, torch.bfloat16)
    del state["encoder.embed_tokens.weight"]  # the same tensor as shared.weight
    torch.save(state, folder / BASE / "models_t5_umt5-xxl-enc-bf16.pth")
    words = folder / BASE / "google/umt5-xxl"
    words.mkdir(parents=True, exist_ok=True)
    tokenizer.backend_tokenizer.save(str(words / "tokenizer.json"))
    write_json(words / "special_tokens_map.json", SPECIAL)
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(words / "tokenizer_config.json", kind | SPECIAL | {"model_max_length": tokenizer.model_max_length})


def export_base(model: CausalWanTransformer, folder: Path) -> None:
    save_file(
        original_state(model, TRANSFORMER_NAMES, torch.bfloat16),
        folder / BASE / "diffusion_pytorch_model.safetensors",
        metadata={"format": "pt"},
    )
    sizes = {name: getattr(model.config, name) for name in model.config.__dataclass_fields__}
    header = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v"}
    write_json(folder / BASE / "config.json", header | sizes)


def export_distilled(model: CausalWanTransformer, path: Path, keys: tuple[str, ...]) -> None:
    """A checkpoint whose ``keys`` all name the same weights, which the file holds once."""
    state = {f"model.{key}": t for key, t in original_state(model, TRANSFORMER_NAMES, torch.bfloat16).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict.fromkeys(keys, state), path)
