"""Wan's names become diffusers', and full-size 14B weights load strictly under both."""

from pathlib import Path

import pytest
import torch
from conftest import BASE
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file

from inferix import InputError
from inferix.checkpoints.containers import infer_sizes, load_checkpoint, read_transformer
from inferix.checkpoints.files import load_strict
from inferix.checkpoints.keys import diffusers_names, vae_name
from inferix.models.config import TransformerConfig
from inferix.models.transformer import CausalWanTransformer

SIZES_14B = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
SIZES_1_3B = {"dim": 1536, "ffn_dim": 8960, "num_heads": 12, "num_layers": 30}


def wan_names(num_layers: int) -> list[str]:
    """The names of a transformer of ``num_layers`` blocks in Wan's spelling, after those of the golden file's two."""
    names = list(load_file(BASE / "diffusion_pytorch_model.safetensors"))
    block = [name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")]
    assert len(block) == 27
    others = [name for name in names if not name.startswith("blocks.")]
    return others + [f"blocks.{layer}.{name}" for layer in range(num_layers) for name in block]


def diffusers_state(dim: int, ffn_dim: int, num_heads: int, num_layers: int) -> dict[str, torch.Tensor]:
    """The weights of diffusers' own transformer of these sizes, on the meta device."""
    sizes = {"ffn_dim": ffn_dim, "num_attention_heads": num_heads, "num_layers": num_layers}
    with torch.device("meta"):
        return WanTransformer3DModel(attention_head_dim=dim // num_heads, **sizes).state_dict()


def test_names_are_those_that_diffusers_gives():
    names = wan_names(12)
    converted = convert_wan_transformer_to_diffusers({name: name for name in names})
    assert diffusers_names(names) == list(converted)
    assert diffusers_names(converted) == list(converted)


def test_a_vaes_names_are_those_that_diffusers_gives():
    state = torch.load(BASE / "Wan2.1_VAE.pth", weights_only=True)
    converted = convert_wan_vae_to_diffusers(dict(state))
    assert len(state) == 194
    assert {vae_name(name): id(tensor) for name, tensor in state.items()} == {k: id(v) for k, v in converted.items()}


def test_names_with_underscores_for_dots():
    names = wan_names(12)
    underscored = diffusers_names([name.replace(".", "_") for name in names], "_")
    assert underscored == [name.replace(".", "_") for name in diffusers_names(names)]
    assert len(set(underscored)) == len(names)


def test_reading_leaves_its_input_as_it_was():
    state = load_file(BASE / "diffusion_pytorch_model.safetensors")
    before = dict(state)
    read_transformer(state)
    assert state == before


@pytest.mark.parametrize("sizes", [SIZES_1_3B, SIZES_14B], ids=["1.3B", "14B"])
@pytest.mark.parametrize("spelling", ["diffusers", "Wan"])
def test_full_size_weights_load_strictly(sizes, spelling):
    state = diffusers_state(**sizes)
    if spelling == "Wan":
        names = wan_names(sizes["num_layers"])
        state = {f"model.{name}": state[new] for name, new in zip(names, diffusers_names(names), strict=True)}
    read = read_transformer(state)
    assert infer_sizes(read) == sizes | {"freq_dim": 256, "text_dim": 4096, "in_dim": 16, "out_dim": 16}
    with torch.device("meta"):
        model = CausalWanTransformer(TransformerConfig(**infer_sizes(read)))
    load_strict(model, read, Path("checkpoint"))
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert round(billions, 1) == {1536: 1.4, 5120: 14.3}[sizes["dim"]]


def test_sizes_that_cannot_be_seen():
    state = load_checkpoint(BASE).state
    with pytest.raises(InputError, match="of width 96 .* needs its config.json"):
        infer_sizes(state)
    del state["blocks.0.ffn.net.0.proj.weight"]
    with pytest.raises(InputError, match="blocks.0.ffn.net.0.proj.weight"):
        infer_sizes(state)
