"""The public checkpoints' own names and shapes, at full size, load strictly through the engine; so do diffusers' folders.

The full-size files are written with holes for their 30 GB of numbers: they take no disk, and the engine maps them into
memory without reading them. Their names and shapes follow from the architectures, spelled out here; that this is spelled
right is checked on the golden files, which carry the same names.
"""

import json
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from conftest import BASE, CAUSVID, ROOT, SELF_FORCING
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoTokenizer

from inferix import CausVidPipeline, InputError, SelfForcingPipeline
from inferix.checkpoints.containers import read_transformer

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, in_dim: int, out_dim: int) -> Shapes:
    return {f"{name}.weight": (out_dim, in_dim), f"{name}.bias": (out_dim,)}


def conv(name: str, in_dim: int, out_dim: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (out_dim, in_dim, *kernel), f"{name}.bias": (out_dim,)}


def wan_transformer(dim: int, ffn_dim: int, freq_dim: int, text_dim: int, num_layers: int) -> Shapes:
    shapes = conv("patch_embedding", 16, dim, 1, 2, 2)
    shapes |= linear("text_embedding.0", text_dim, dim) | linear("text_embedding.2", dim, dim)
    shapes |= linear("time_embedding.0", freq_dim, dim) | linear("time_embedding.2", dim, dim)
    shapes |= linear("time_projection.1", dim, 6 * dim)
    shapes |= linear("head.head", dim, 64) | {"head.modulation": (1, 2, dim)}
    for block in (f"blocks.{layer}" for layer in range(num_layers)):
        for attention in (f"{block}.self_attn", f"{block}.cross_attn"):
            for part in "qkvo":
                shapes |= linear(f"{attention}.{part}", dim, dim)
            shapes |= {f"{attention}.norm_q.weight": (dim,), f"{attention}.norm_k.weight": (dim,)}
        shapes |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,), f"{block}.modulation": (1, 6, dim)}
        shapes |= linear(f"{block}.ffn.0", dim, ffn_dim) | linear(f"{block}.ffn.2", ffn_dim, dim)
    return shapes


def umt5_encoder(dim: int, ffn_dim: int, num_heads: int, num_layers: int, vocabulary: int) -> Shapes:
    shapes: Shapes = {"token_embedding.weight": (vocabulary, dim), "norm.weight": (dim,)}
    for block in (f"blocks.{layer}" for layer in range(num_layers)):
        shapes |= {f"{block}.norm{i}.weight": (dim,) for i in (1, 2)}
        shapes |= {f"{block}.attn.{part}.weight": (dim, dim) for part in "qkvo"}
        shapes |= {f"{block}.ffn.{part}.weight": (ffn_dim, dim) for part in ("gate.0", "fc1")}
        shapes |= {
            f"{block}.ffn.fc2.weight": (dim, ffn_dim),
            f"{block}.pos_embedding.embedding.weight": (32, num_heads),
        }
    return shapes


def vae_residual(name: str, in_dim: int, out_dim: int) -> Shapes:
    shapes = {f"{name}.residual.0.gamma": (in_dim, 1, 1, 1)} | conv(f"{name}.residual.2", in_dim, out_dim, 3, 3, 3)
    shapes |= {f"{name}.residual.3.gamma": (out_dim, 1, 1, 1)} | conv(f"{name}.residual.6", out_dim, out_dim, 3, 3, 3)
    return shapes | (conv(f"{name}.shortcut", in_dim, out_dim, 1, 1, 1) if in_dim != out_dim else {})


def vae_middle(name: str, dim: int) -> Shapes:
    shapes = vae_residual(f"{name}.0", dim, dim) | vae_residual(f"{name}.2", dim, dim)
    shapes |= {f"{name}.1.norm.gamma": (dim, 1, 1)}
    return shapes | conv(f"{name}.1.to_qkv", dim, 3 * dim, 1, 1) | conv(f"{name}.1.proj", dim, dim, 1, 1)


def numbered(prefix: str) -> Iterator[str]:
    return (f"{prefix}.{number}" for number in range(100))


def wan_vae(base: int, z_dim: int = 16) -> Shapes:
    top = 4 * base
    shapes = conv("encoder.conv1", 3, base, 3, 3, 3) | conv("conv1", 2 * z_dim, 2 * z_dim, 1, 1, 1)
    names = numbered("encoder.downsamples")
    for level, (in_dim, dim) in enumerate([(base, base), (base, 2 * base), (2 * base, top), (top, top)]):
        shapes |= vae_residual(next(names), in_dim, dim) | vae_residual(next(names), dim, dim)
        if level < 3:
            shapes |= conv(f"{(name := next(names))}.resample.1", dim, dim, 3, 3)
            shapes |= conv(f"{name}.time_conv", dim, dim, 3, 1, 1) if level > 0 else {}
    shapes |= vae_middle("encoder.middle", top)
    shapes |= {"encoder.head.0.gamma": (top, 1, 1, 1)} | conv("encoder.head.2", top, 2 * z_dim, 3, 3, 3)

    shapes |= conv("conv2", z_dim, z_dim, 1, 1, 1) | conv("decoder.conv1", z_dim, top, 3, 3, 3)
    shapes |= vae_middle("decoder.middle", top)
    names = numbered("decoder.upsamples")
    for level, (in_dim, dim) in enumerate([(top, top), (top // 2, top), (top // 2, 2 * base), (base, base)]):
        for block_in in (in_dim, dim, dim):
            shapes |= vae_residual(next(names), block_in, dim)
        if level < 3:
            shapes |= conv(f"{(name := next(names))}.resample.1", dim, dim // 2, 3, 3)
            shapes |= conv(f"{name}.time_conv", dim, 2 * dim, 3, 1, 1) if level < 2 else {}
    return shapes | {"decoder.head.0.gamma": (base, 1, 1, 1)} | conv("decoder.head.2", base, 3, 3, 3, 3)


REAL_TRANSFORMER = wan_transformer(dim=1536, ffn_dim=8960, freq_dim=256, text_dim=4096, num_layers=30)
REAL_UMT5 = umt5_encoder(dim=4096, ffn_dim=10240, num_heads=64, num_layers=24, vocabulary=256384)
REAL_VAE = wan_vae(base=96)


def test_the_shapes_are_spelled_right():
    def shapes(state) -> Shapes:
        return {name: tuple(tensor.shape) for name, tensor in state.items()}

    assert wan_transformer(96, 192, 64, 64, 2) == shapes(load_file(BASE / "diffusion_pytorch_model.safetensors"))
    assert umt5_encoder(64, 128, 4, 2, 256) == shapes(torch.load(BASE / "models_t5_umt5-xxl-enc-bf16.pth"))
    assert wan_vae(8) == shapes(torch.load(BASE / "Wan2.1_VAE.pth"))
    sizes = [sum(map(prod, shapes.values())) for shapes in (REAL_TRANSFORMER, REAL_UMT5, REAL_VAE)]
    assert sizes == [1_418_996_800, 5_680_910_336, 126_892_531]  # 5.68 GB float32, 11.36 GB bfloat16, 0.51 GB float32


def write_safetensors(shapes: Shapes, path: Path) -> None:
    """A float32 safetensors file whose numbers are a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_pickle(shapes: Shapes, path: Path, dtype: torch.dtype, key: str | None = None, prefix: str = "") -> None:
    """A PyTorch checkpoint whose numbers are a hole."""
    with FakeTensorMode():
        state = {f"{prefix}{name}": torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({key: state} if key else state, path)


def resident_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * 4096


@pytest.fixture(scope="module")
def public_weights(tmp_path_factory) -> Iterator[Path]:
    """The folder ``weights`` as download.sh lays it out."""
    weights = tmp_path_factory.mktemp("weights")
    base = weights / "Wan2.1-T2V-1.3B"
    shutil.copytree(BASE / "google", base / "google")
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": 1536, "ffn_dim": 8960, "freq_dim": 256}
    config |= {"in_dim": 16, "out_dim": 16, "num_heads": 12, "num_layers": 30, "text_len": 512, "eps": 1e-06}
    (base / "config.json").write_text(json.dumps(config))
    write_safetensors(REAL_TRANSFORMER, base / "diffusion_pytorch_model.safetensors")
    write_pickle(REAL_UMT5, base / "models_t5_umt5-xxl-enc-bf16.pth", torch.bfloat16)
    write_pickle(REAL_VAE, base / "Wan2.1_VAE.pth", torch.float32)
    for path, key in (("self_forcing/checkpoints/self_forcing_dmd.pt", "generator_ema"),
                      ("CausVid/autoregressive_checkpoint/model.pt", "generator")):  # fmt: skip
        (weights / path).parent.mkdir(parents=True)
        write_pickle(REAL_TRANSFORMER, weights / path, torch.float32, key, "model.")
    yield weights
    shutil.rmtree(weights)


@pytest.mark.parametrize("name", ["self_forcing", "causvid"])
def test_the_public_weights_load(public_weights, name):
    before = resident_bytes()
    if name == "self_forcing":
        config = ROOT / "example/self_forcing/configs/self_forcing_dmd.yaml"
        pipeline = SelfForcingPipeline(config, wan_base_model_path=public_weights / "Wan2.1-T2V-1.3B", device="cpu")
        pipeline.load_checkpoint(public_weights / "self_forcing/checkpoints/self_forcing_dmd.pt", use_ema=True)
    else:
        config = ROOT / "example/causvid/configs/causvid.yaml"
        pipeline = CausVidPipeline(config, wan_base_model_path=public_weights / "Wan2.1-T2V-1.3B", device="cpu")
        pipeline.load_checkpoint(public_weights / "CausVid")
    parts = pipeline.pipeline
    for model, shapes in ((parts.generator.model, REAL_TRANSFORMER), (parts.text_encoder.model, REAL_UMT5)):
        assert sum(parameter.numel() for parameter in model.parameters()) == sum(map(prod, shapes.values()))
        assert not any(parameter.is_meta for parameter in model.parameters())
    assert parts.vae.base_dim == 96
    assert parts.text_encoder.model.config.num_heads == 64 and parts.generator.model.config.num_heads == 12
    assert resident_bytes() - before < 1.5e9  # of 18 GB: the files stay on disk


def original_transformer() -> dict[str, torch.Tensor]:
    return load_file(BASE / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory, self_forcing) -> Path:
    """The golden base model as diffusers and transformers save it, the transformer in several files."""
    folder = tmp_path_factory.mktemp("Wan2.1-T2V-tiny-Diffusers")
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=48,
        text_dim=64,
        freq_dim=64,
        ffn_dim=192,
        num_layers=2,
    )
    transformer.load_state_dict(read_transformer(original_transformer()), strict=True)
    transformer.save_pretrained(folder / "transformer", max_shard_size="500KB")
    state = torch.load(BASE / "Wan2.1_VAE.pth")
    vae = AutoencoderKLWan(base_dim=8)
    vae.load_state_dict(convert_wan_vae_to_diffusers(state), strict=True)
    vae.save_pretrained(folder / "vae")
    self_forcing.pipeline.text_encoder.model.save_pretrained(folder / "text_encoder")
    AutoTokenizer.from_pretrained(BASE / "google/umt5-xxl").save_pretrained(folder / "tokenizer")
    return folder


def test_a_diffusers_folder_gives_the_same_video(diffusers_folder, self_forcing):
    assert len(list((diffusers_folder / "transformer").glob("*.safetensors"))) > 1
    config = ROOT / "example/self_forcing/configs/self_forcing_dmd.yaml"
    pipeline = SelfForcingPipeline(config, wan_base_model_path=diffusers_folder, device="cpu")
    base = read_transformer(original_transformer())
    assert all(
        torch.equal(base[name], tensor) for name, tensor in pipeline.pipeline.generator.model.state_dict().items()
    )
    pipeline.load_checkpoint(SELF_FORCING, use_ema=True)
    pipeline.setup_devices()
    noise = torch.randn(1, 3, 16, 8, 12)
    videos = [
        p.pipeline.inference(noise, ["A red cat walks on the moon"], generator=torch.Generator().manual_seed(1))
        for p in (pipeline, self_forcing)
    ]
    torch.testing.assert_close(*videos, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("removed", "complaint"),
    [
        ("transformer/diffusion_pytorch_model-00001-of-*.safetensors", "shards of diffusion_pytorch_model"),
        ("vae/diffusion_pytorch_model.safetensors", "not found"),
        ("vae/config.json", "not found"),
        ("text_encoder/config.json", "config.json"),
        ("text_encoder/model.safetensors", "not found"),
        ("tokenizer/tokenizer.json", "no tokenizer.json"),
    ],
)
def test_diffusers_folder_that_lacks_a_file(diffusers_folder, tmp_path, removed, complaint):
    shutil.copytree(diffusers_folder, tmp_path / "base")
    next((tmp_path / "base").glob(removed)).unlink()
    config = ROOT / "example/self_forcing/configs/self_forcing_dmd.yaml"
    with pytest.raises(InputError, match=complaint):
        SelfForcingPipeline(config, wan_base_model_path=tmp_path / "base", device="cpu")


def test_diffusers_vae_that_lacks_a_tensor(diffusers_folder, tmp_path):
    """diffusers itself would make one up and warn."""
    shutil.copytree(diffusers_folder, tmp_path / "base")
    path = tmp_path / "base/vae/diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["decoder.conv_out.bias"]
    save_file(state, path)
    config = ROOT / "example/self_forcing/configs/self_forcing_dmd.yaml"
    with pytest.raises(InputError, match="decoder.conv_out.bias"):
        SelfForcingPipeline(config, wan_base_model_path=tmp_path / "base", device="cpu")


def test_every_spelling_of_a_transformers_keys_is_the_same_transformer():
    state = torch.load(CAUSVID / "model.pt")["generator"]
    wanted = read_transformer(dict(state))
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    for spelling in (
        bare,
        {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in bare.items()},
        dict(wanted),
    ):
        read = read_transformer(spelling)
        assert read.keys() == wanted.keys() and all(torch.equal(read[name], wanted[name]) for name in wanted)
