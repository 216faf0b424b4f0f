"""Checkpoints in every published container give the weights and the video that they give in their own projects.

The golden files are described in tests/golden/README.md, "Checkpoint containers" and "Causal-Forcing".
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import BASE, CAUSVID, GOLDEN, SELF_FORCING
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor

from inferix import CausVidPipeline, SelfForcingPipeline
from inferix.checkpoints.containers import Checkpoint, dequantize, load_checkpoint, quantized_weights

CONTAINERS = GOLDEN / "containers"
CONFIG = GOLDEN / "configs/causal_forcing_chunkwise.yaml"
FP8 = CONTAINERS / "lightx2v_fp8.safetensors"
PATHS = {
    "bf16": [CONTAINERS / "bare.pt", CONTAINERS / "flat_model_prefix.safetensors", CONTAINERS / "diffusers"],
    "fp8": [FP8],
    "flat": [BASE / "diffusion_pytorch_model.safetensors"],
}
EVERY = [(kind, path) for kind, paths in PATHS.items() for path in paths]


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected/containers.safetensors")


@pytest.fixture(scope="module")
def pipeline() -> SelfForcingPipeline:
    return SelfForcingPipeline(CONFIG, wan_base_model_path=BASE, device="cpu", dtype=torch.float32)


def original() -> dict[str, Tensor]:
    """The averaged weights of ``self_forcing_dmd.pt`` under Wan's names."""
    state = torch.load(SELF_FORCING, weights_only=True)["generator_ema"]
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


def in_diffusers_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """By diffusers' own converter, which empties what it is given."""
    return convert_wan_transformer_to_diffusers(dict(state))


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(("kind", "path"), EVERY, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("use_ema", [False, True])
def test_weights_are_the_golden_ones(golden, kind, path, use_ema):
    state = dequantize(load_checkpoint(path, use_ema))
    rows = {key.removeprefix(f"{kind}."): tensor for key, tensor in golden.items() if key.startswith(f"{kind}.")}
    assert len(rows) == 4
    for name, expected in in_diffusers_names(rows).items():
        assert torch.equal(state[name][: len(expected)].float(), expected), name
    if kind == "bf16":
        rounded = {name: tensor.bfloat16() for name, tensor in original().items()}
        assert_equal(state, in_diffusers_names(rounded))


@pytest.mark.parametrize(("kind", "path"), EVERY, ids=lambda value: getattr(value, "name", value))
def test_latents_are_the_golden_ones(pipeline, golden, kind, path):
    pipeline.load_checkpoint(path)
    pipeline.setup_devices()
    generator = torch.Generator().manual_seed(44)
    noise = torch.randn(golden["noise"].shape, generator=generator)
    assert torch.equal(noise, golden["noise"])
    prompts = ["A red cat walks on the moon"]
    _, latents = pipeline.pipeline.inference(noise, prompts, generator=generator, return_latents=True)
    torch.testing.assert_close(latents, golden[f"latents_{kind}"], rtol=0, atol=1e-3)


def test_both_pipelines_take_any_container():
    """CausVid's takes Self-Forcing's file, and the other way round."""
    for kind, path in ((CausVidPipeline, CONTAINERS / "bare.pt"), (SelfForcingPipeline, CAUSVID)):
        pipeline = kind(CONFIG, wan_base_model_path=BASE, device="cpu", dtype=torch.float32)
        pipeline.load_checkpoint(path)
        assert_equal(pipeline.pipeline.generator.model.state_dict(), load_checkpoint(path).state)


def test_use_ema_chooses_where_there_is_a_choice():
    content = torch.load(SELF_FORCING, weights_only=True)
    for key, use_ema in (("generator", False), ("generator_ema", True)):
        plain = {name.removeprefix("model."): tensor for name, tensor in content[key].items()}
        assert_equal(load_checkpoint(SELF_FORCING, use_ema).state, in_diffusers_names(plain))


@pytest.mark.parametrize("key", ["generator", "generator_ema", "model", None])
@pytest.mark.parametrize("use_ema", [False, True])
def test_use_ema_means_nothing_where_there_is_none(tmp_path, key, use_ema):
    torch.save({key: original(), "step": 3} if key else original(), tmp_path / "checkpoint.bin")
    assert_equal(load_checkpoint(tmp_path / "checkpoint.bin", use_ema).state, in_diffusers_names(original()))


def test_causal_forcings_file_holds_averaged_weights_alone():
    path = GOLDEN / "CausalForcing/framewise/causal_forcing.pt"
    state = torch.load(path, weights_only=True)["generator_ema"]
    plain = {name.removeprefix("model._fsdp_wrapped_module."): tensor for name, tensor in state.items()}
    assert_equal(load_checkpoint(path).state, in_diffusers_names(plain))


@pytest.mark.parametrize(
    "spelling",
    [
        "{}",
        "model.{}",
        "_fsdp_wrapped_module.{}",
        "model._fsdp_wrapped_module.{}",
        "diffusion_model.{}",
        "model.diffusion_model.{}",
        "model._fsdp_wrapped_module._checkpoint_wrapped_module.{}",
    ],
)
def test_what_a_name_begins_with_does_not_matter(tmp_path, spelling):
    save_file({spelling.format(name): tensor for name, tensor in original().items()}, tmp_path / "x.safetensors")
    assert_equal(load_checkpoint(tmp_path / "x.safetensors").state, in_diffusers_names(original()))


def test_wrappers_inside_a_name_do_not_matter(tmp_path):
    state = {name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): t for name, t in original().items()}
    torch.save(state, tmp_path / "x.pt")
    assert_equal(load_checkpoint(tmp_path / "x.pt").state, in_diffusers_names(original()))


def test_the_name_of_the_file_does_not_matter(tmp_path):
    (tmp_path / "a").symlink_to(CONTAINERS / "flat_model_prefix.safetensors")
    (tmp_path / "b.safetensors").symlink_to(CONTAINERS / "bare.pt")
    torch.save(original(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_equal(load_checkpoint(tmp_path / "a").state, load_checkpoint(tmp_path / "b.safetensors").state)
    assert_equal(load_checkpoint(tmp_path / "old.pt").state, in_diffusers_names(original()))


def save_shards(folder: Path, index: bool) -> Path:
    """Write the golden weights as three files. Return ``folder``."""
    items = list(original().items())
    names = [f"model-{number:05}-of-00003.safetensors" for number in (1, 2, 3)]
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        save_file(dict(items[number::3]), folder / name)
    if index:
        weight_map = {key: names[number % 3] for number, (key, _) in enumerate(items)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("given", ["transformer", ".", "transformer/model-00002-of-00003.safetensors"])
def test_shards(tmp_path, index, given):
    save_shards(tmp_path / "transformer", index)
    assert_equal(load_checkpoint(tmp_path / given).state, in_diffusers_names(original()))


def test_an_index_of_shards(tmp_path):
    path = save_shards(tmp_path / "weights", index=True) / "model.safetensors.index.json"
    assert_equal(load_checkpoint(path).state, in_diffusers_names(original()))


@pytest.mark.parametrize("path", ["x.pt", "autoregressive_checkpoint/model.pt", "checkpoints/x.safetensors"])
def test_a_folder_that_holds_one_checkpoint(tmp_path, path):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).symlink_to(CONTAINERS / "bare.pt")
    (tmp_path / "README.md").write_text("# A model\n")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/model.pt").write_bytes(b"")
    assert load_checkpoint(tmp_path).path == tmp_path / path


def test_causvids_own_folder_among_its_other_models(tmp_path):
    for name in ("autoregressive_checkpoint", "bidirectional_checkpoint1", "bidirectional_checkpoint2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pt").symlink_to(CAUSVID / "model.pt")
    assert load_checkpoint(tmp_path).path == tmp_path / "autoregressive_checkpoint/model.pt"


def test_a_base_models_folder_is_its_transformer():
    assert load_checkpoint(BASE).path == BASE / "diffusion_pytorch_model.safetensors"


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LightX2V's way: one scale a row."""
    largest = 448 if dtype == torch.float8_e4m3fn else 127
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-5) / largest
    scaled = weight / scale
    return (scaled if dtype.is_floating_point else scaled.round()).to(dtype), scale


def eight_bit(dtype: torch.dtype, scale_name: str, per_row: bool, scale_dtype=torch.float32) -> dict[str, Tensor]:
    """The golden weights with the ten Linears of each block in 8 bits, under Wan's names."""
    state = original()
    for name in [name for name in state if name.startswith("blocks.") and state[name].ndim == 2]:
        weight, scale = quantize(state[name], dtype)
        if not per_row:
            scale = state[name].abs().amax() / 448
            weight = (state[name] / scale).to(dtype)
        state[name], state[f"{name.removesuffix('weight')}{scale_name}"] = weight, scale.to(scale_dtype)
    return state


def assert_close_to_the_original(checkpoint: Checkpoint, tolerance: float) -> None:
    """Each weight dequantized, off by no more than ``tolerance`` of its row's largest magnitude."""
    state, expected = dequantize(checkpoint), in_diffusers_names(original())
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        limit = tolerance * tensor.abs().amax() if tensor.ndim == 2 else 0
        assert (state[name].float() - tensor).abs().amax() <= limit, name


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_lightx2v_int8(tmp_path, prefix, scale_dtype):
    state = eight_bit(torch.int8, "weight_scale", True, scale_dtype)
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "int8.safetensors")
    checkpoint = load_checkpoint(tmp_path / "int8.safetensors")
    assert len(checkpoint.scales) == 20
    assert_close_to_the_original(checkpoint, 0.01)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_comfyui_scaled_fp8(tmp_path, dtype):
    state = eight_bit(dtype, "scale_weight", False) | {"scaled_fp8": torch.zeros(2, dtype=dtype)}
    state |= {"blocks.0.ffn.0.scale_input": torch.ones(())}
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    save_file(state, tmp_path / "scaled.safetensors")
    assert_close_to_the_original(load_checkpoint(tmp_path / "scaled.safetensors"), 0.2)


def test_float8_without_a_scale_is_the_number_itself(tmp_path):
    state = {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for name, t in original().items()}
    save_file(state, tmp_path / "plain.safetensors")
    checkpoint = load_checkpoint(tmp_path / "plain.safetensors")
    assert checkpoint.scales == {}
    wanted = {name: tensor.float() for name, tensor in in_diffusers_names(state).items()}
    assert_equal(dequantize(checkpoint), wanted)


def test_eight_bit_weights_can_be_taken_over_as_they_are(pipeline):
    pipeline.load_checkpoint(FP8)
    stored = in_diffusers_names({name.removeprefix("model."): tensor for name, tensor in load_file(FP8).items()})
    assert pipeline.quantized_weights.keys() == {n.removesuffix(".weight_scale") for n in stored if "weight_scale" in n}
    for name, (qweight, scale) in pipeline.quantized_weights.items():
        assert torch.equal(qweight.float(), stored[f"{name}.weight"].float()) and qweight.dtype == torch.float8_e4m3fn
        assert torch.equal(scale, stored[f"{name}.weight_scale"])
        assert torch.equal(qweight.float() * scale, pipeline.pipeline.generator.model.get_parameter(f"{name}.weight"))
    pipeline.load_checkpoint(CONTAINERS / "bare.pt")
    assert pipeline.quantized_weights == {}


def test_dequantized_weights_come_in_the_dtype_asked_for():
    exact, rounded = (dequantize(load_checkpoint(FP8), dtype) for dtype in (torch.float32, torch.bfloat16))
    name = "blocks.0.attn1.to_q.weight"
    assert rounded[name].dtype == torch.bfloat16 and torch.equal(rounded[name], exact[name].bfloat16())


def test_scales_of_other_dtypes_are_taken_over_in_float32(tmp_path):
    state = eight_bit(torch.float8_e4m3fn, "weight_scale", True, torch.bfloat16)
    save_file(state, tmp_path / "x.safetensors")
    weights = quantized_weights(load_checkpoint(tmp_path / "x.safetensors"))
    assert {(w.weight_scale.dtype, w.weight_scale.shape[1]) for w in weights.values()} == {(torch.float32, 1)}
