"""Presets, LoRAs, 8-bit checkpoints, sizes and downloads, as the scripts take them; bad input is one line and exit code 2."""

import shutil
import threading
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from conftest import BASE, GOLDEN, ROOT, SELF_FORCING, load_runner, small_config
from omegaconf import OmegaConf
from safetensors import safe_open
from scripts import run as run_script
from scripts import run_here, self_forcing_env  # noqa: F401

from dax.quant.nn.linear import QuantizedLinear
from dax.quant.quantization import load_quantized, read_metadata
from inferix import InputError, SelfForcingPipeline
from inferix.checkpoints.containers import infer_sizes, load_checkpoint, quantized_weights
from inferix.cli import download
from inferix.cli.arguments import parse_causvid, parse_self_forcing
from inferix.cli.main import run
from inferix.cli.model_paths import find_tiny_vae, resolve_model_paths
from inferix.cli.presets import GEOMETRIES, PRESETS, parameter_counts, preset_table, weight_gigabytes
from inferix.config import load_config
from inferix.models.base_model import WanCheckpoint, empty_transformer
from inferix.models.config import TransformerConfig
from inferix.video import count_frames

# ruff: noqa: F811

LORA = GOLDEN / "LoRA"
FP8 = GOLDEN / "containers/lightx2v_fp8.safetensors"
RUNNER = load_runner("self_forcing")
REFERENCES = {
    "causal_forcing": "causal_forcing_chunkwise",
    "causal_forcing_framewise": "causal_forcing_framewise",
    "causal_forcing_framewise_2step": "causal_forcing_framewise_2step",
    "causal_forcing_framewise_1step": "causal_forcing_framewise_1step",
    "longlive": "longlive_interactive",
}
"""Presets whose reference config is in the golden data. That of LongLive is for a small model and for one video's prompts."""


# --- presets


@pytest.mark.parametrize(("preset", "reference"), REFERENCES.items())
def test_config_is_the_references(preset, reference):
    ours, theirs = load_config(PRESETS[preset].config_path), load_config(GOLDEN / f"configs/{reference}.yaml")
    small = {"local_attn_size", "adapter", "switch_frame_indices"}
    differ = {"image_or_video_shape"} | (small if preset == "longlive" else set())
    for key, value in asdict(ours).items():
        assert key in differ or value == asdict(theirs)[key], key
    known = OmegaConf.load(GOLDEN / f"configs/{reference}.yaml").keys() | {"context_noise"}
    assert OmegaConf.load(PRESETS[preset].config_path).keys() <= known


@pytest.mark.parametrize(
    ("preset", "steps", "warped", "shift"),
    [
        ("self_forcing", (1000, 750, 500, 250), True, 5),
        ("self_forcing_sid", (1000, 750, 500, 250), True, 5),
        ("causvid", (1000, 757, 522), False, 8),
        ("causvid_4step", (1000, 750, 500, 250), True, 8),
        ("causvid_14b", (999, 934, 862, 756, 603, 410, 250, 140, 74), False, 8),
        ("krea_14b", (1000, 937, 833, 625), False, 5),
    ],
)
def test_config_without_a_golden_reference(preset, steps, warped, shift):
    config = load_config(PRESETS[preset].config_path)
    assert (config.denoising_step_list, config.warp_denoising_step, config.timestep_shift) == (steps, warped, shift)
    assert config.num_frame_per_block == 3 and config.image_or_video_shape == (1, 21, 16, 60, 104)


def test_longlive_window():
    config = load_config(PRESETS["longlive"].config_path)
    assert (config.local_attn_size, config.sink_size, config.adapter) == (12, 3, {"rank": 256, "alpha": 256})


@pytest.mark.parametrize("size", GEOMETRIES)
def test_sizes_of_the_weights(size):
    model = empty_transformer(GEOMETRIES[size])
    assert sum(parameter_counts(GEOMETRIES[size])[::2]) == sum(weight.numel() for weight in model.parameters())
    bf16, eight_bit = weight_gigabytes(GEOMETRIES[size])
    assert bf16 == pytest.approx({"1.3B": 2.84, "14B": 28.6}[size], abs=0.05) and eight_bit < 0.52 * bf16


def test_table_lists_every_preset(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_causvid(["--preset", "list"])
    table = capsys.readouterr().out
    assert exit.value.code == 0 and table == preset_table() + "\n"
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    framewise = next(line for line in lines if line.startswith("causal_forcing_framewise_2step"))
    assert "2, first block 4" in framewise and "Apache-2.0" in framewise and "framewise-2step.pt" in framewise


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--preset", "wan3"], "there is no preset wan3; PRESET=list lists them"),
        (["--preset", "causvid"], "causvid is a preset of causvid_quantized.sh"),
        (["--lora_path", "none.pt:0.5"], "none.pt not found"),
        (["--lora_path", f"{LORA}/peft.safetensors:big"], "peft.safetensors must be a number, not 'big'"),
        (["--lora_path", f"{LORA}/peft.safetensors:nan"], "peft.safetensors must be a number, not 'nan'"),
        (["--lora_path", ";"], "the LoRA not found"),
        (["--lora_path", f"{LORA}/peft.safetensors", "--load_quantized", "."], "leave one out"),
        (["--height", "100"], "it must be a multiple of 16, not '100'"),
        (["--width", "0"], "it must be a multiple of 16, not '0'"),
        (["--vae", "huge"], "--vae: invalid choice"),
        (["--tiny_vae_path", str(SELF_FORCING)], "needs --vae tiny"),
    ],
)
def test_wrong_flags(flags, complaint):
    with pytest.raises(InputError) as error:
        parse_self_forcing(flags)
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "given", "missing"),
    [
        ("krea_14b", [], "Wan2.1-T2V-14B/models_t5_umt5-xxl-enc-bf16.pth"),
        ("krea_14b", ["--wan_base_model_path", str(BASE)], "krea/krea-realtime-video-14b.safetensors"),
        (
            "longlive",
            ["--wan_base_model_path", str(BASE), "--checkpoint_path", str(SELF_FORCING)],
            "longlive/models/lora.pt",
        ),
    ],
)
def test_preset_whose_files_are_not_there(name, given, missing):
    if (ROOT / "weights" / missing).exists():
        pytest.skip("it was downloaded")
    with pytest.raises(
        InputError, match=f"^PRESET={name}: weights/{missing} not found; ./weights/download.sh {name} fetches"
    ):
        parse_self_forcing(["--preset", name, *given])


def test_scripts_list_the_presets(self_forcing_env, tmp_path):
    for script in ("self_forcing", "causvid"):
        result = run_script(f"{script}_quantized.sh", self_forcing_env | {"PRESET": "list"}, tmp_path)
        assert (result.returncode, result.stdout, result.stderr) == (0, preset_table() + "\n", "")


def test_script_with_all_variables(self_forcing_env, tmp_path):
    """A preset's config, another base and checkpoint, a LoRA, the tiny VAE and a size: as variables."""
    variables = {
        "PRESET": "causal_forcing_framewise_2step",
        "CONFIG_PATH": "",
        "LORA_PATH": f"{LORA}/kohya.safetensors:0.5",
        "VAE": "tiny",
        "TINY_VAE_PATH": str(GOLDEN / "TAEHV/taew2_1.pth"),
        "HEIGHT": "64",
        "WIDTH": "96",
        "NUM_OUTPUT_FRAMES": "2",  # blocks of one frame
    }
    result = run_here("self_forcing_quantized.sh", self_forcing_env | variables, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "LoRA               kohya.safetensors, strength 0.5: 20 modules changed" in result.stdout
    (path,) = (tmp_path / "my videos").glob("*.mp4")
    assert count_frames(path) == 5 and iio.immeta(path, plugin="FFMPEG")["size"] == (96, 64)


def test_preset_sets_what_the_user_has_not_set(tmp_path):
    lora = f"{LORA}/peft.safetensors:0.8;{LORA}/kohya.safetensors"
    flags = ["--wan_base_model_path", str(BASE), "--checkpoint_path", str(SELF_FORCING), "--lora_path", lora]
    args = parse_self_forcing(["--preset", "longlive", *flags])
    assert args.lora_path == [(LORA / "peft.safetensors", 0.8), (LORA / "kohya.safetensors", 1.0)]
    assert args.config_path == PRESETS["longlive"].config_path and args.use_ema is False
    assert resolve_model_paths(args)[0].checkpoint == SELF_FORCING
    framewise = parse_self_forcing(["--preset", "causal_forcing_framewise", *flags])
    assert framewise.use_ema is True
    saved = parse_self_forcing(["--preset", "longlive", *flags[:2], "--load_quantized", str(tmp_path)])
    assert saved.lora_path is None and saved.checkpoint_path is None


# --- LoRA, 8-bit checkpoints, sizes, VAE: the runner


@pytest.fixture
def flags(tmp_path) -> list[str]:
    """Flags of the golden model for one block."""
    config = small_config("self_forcing/configs/self_forcing_dmd", tmp_path)
    named = {
        "config_path": config,
        "wan_base_model_path": BASE,
        "output_folder": tmp_path / "out",
        "num_output_frames": 3,
    }
    return [word for name, value in named.items() for word in (f"--{name}", str(value))]


def refusal(flags: list[str], folder: Path, capsys) -> str:
    code, error = run(RUNNER.main, flags), capsys.readouterr().err
    assert (code, error.count("\n"), error[:7]) == (2, 1, "error: "), error
    assert not list(folder.rglob("*.mp4"))
    return error


def test_loras_are_merged_and_saved(flags, tmp_path, capsys):
    lora = f"{LORA}/peft.safetensors:0.5;{LORA}/lightx2v.safetensors"
    flags += ["--checkpoint_path", str(SELF_FORCING), "--use_ema", "--lora_path", lora]
    assert run(RUNNER.main, [*flags, "--save_quantized", str(tmp_path / "int8"), "--quant_type", "int8"]) == 0
    report = capsys.readouterr().out
    assert "LoRA               peft.safetensors, strength 0.5: 20 modules changed" in report
    assert "LoRA               lightx2v.safetensors, strength 1: " in report
    assert "-lora-peft-0.5-lora-lightx2v-" in next((tmp_path / "out").glob("[!.]*.mp4")).name
    merged = pipeline_of_the_golden_model()
    merged.load_checkpoint(SELF_FORCING, use_ema=True)
    merged.load_lora(LORA / "peft.safetensors", 0.5)
    merged.load_lora(LORA / "lightx2v.safetensors")
    saved = load_quantized(empty_transformer(merged.transformer.config), tmp_path / "int8")
    for name in ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2"):
        exact, weight = merged.transformer.get_submodule(name).weight, saved.get_submodule(name).weight
        assert (weight - exact).abs().max() <= exact.abs().amax() / 127
    assert torch.equal(saved.scale_shift_table, merged.transformer.scale_shift_table)
    assert read_metadata(tmp_path / "int8")["loras"] == "peft.safetensors:0.5;lightx2v.safetensors:1.0"


def test_lora_of_another_model(flags, tmp_path, capsys):
    flags += ["--checkpoint_path", str(SELF_FORCING), "--lora_path", str(LORA / "unmatched.safetensors")]
    assert "blocks.7" in refusal(flags, tmp_path, capsys)


def pipeline_of_the_golden_model(base: Path = BASE) -> SelfForcingPipeline:
    config = ROOT / "example/self_forcing/configs/self_forcing_dmd.yaml"
    return SelfForcingPipeline(config, wan_base_model_path=base, device="cpu", transformer_weights=False)


@pytest.mark.parametrize(("quant_type", "taken_over"), [("fp8", True), ("int8", False)])
def test_eight_bit_checkpoint(flags, tmp_path, capsys, quant_type, taken_over):
    flags += ["--checkpoint_path", str(FP8), "--quant_type", quant_type, "--save_quantized", str(tmp_path / "saved")]
    assert run(RUNNER.main, flags) == 0
    assert (
        f"8-bit checkpoint   {20 if taken_over else 0} of 20 weights taken over as they are" in capsys.readouterr().out
    )
    expected = quantized_weights(load_checkpoint(FP8))
    with safe_open(tmp_path / "saved/model.safetensors", framework="pt") as file:
        for name, (qweight, scale) in expected.items():
            stored, stored_scale = (file.get_tensor(f"{name}.{part}") for part in ("qweight", "weight_scale"))
            if taken_over:
                assert torch.equal(stored.view(torch.uint8), qweight.view(torch.uint8)) and torch.equal(
                    stored_scale, scale
                )
            else:  # quantized from the dequantized weight
                exact = qweight.float() * scale
                assert ((stored.float() * stored_scale - exact).abs() <= stored_scale / 2 * 1.001).all()


def test_modules_that_a_lora_changes_are_quantized_anew(flags):
    from quantization import quantize_transformer, take_over_weights

    pipeline = pipeline_of_the_golden_model()
    pipeline.load_checkpoint(FP8)
    pipeline.load_lora(LORA / "peft.safetensors")
    merged = pipeline.transformer.blocks[0].attn1.to_q.weight.clone()
    quantize_transformer(pipeline.transformer, "fp8")
    take_over_weights(pipeline)
    layer = pipeline.transformer.blocks[0].attn1.to_q
    assert isinstance(layer, QuantizedLinear) and pipeline.quantized_weights == {}
    assert (layer.weight - merged).norm() < 0.05 * merged.norm()


@pytest.mark.gpu
def test_eight_bit_checkpoint_on_a_gpu():
    from quantization import quantize_transformer, take_over_weights

    config = ROOT / "example/self_forcing/configs/self_forcing_dmd.yaml"
    pipeline = SelfForcingPipeline(config, wan_base_model_path=BASE, height=64, width=96)
    pipeline.load_checkpoint(FP8)
    pipeline.setup_devices()
    quantize_transformer(pipeline.transformer, "fp8")
    take_over_weights(pipeline)
    for name, (qweight, scale) in quantized_weights(load_checkpoint(FP8)).items():
        layer = pipeline.transformer.get_submodule(name)
        assert torch.equal(layer.qweight.cpu().view(torch.uint8), qweight.view(torch.uint8)), name
        assert torch.equal(layer.weight_scale.cpu(), scale), name
    assert pipeline.generate(["A cat"], 3, pipeline.seeded(0)).isfinite().all()


def copy_of_the_base(folder: Path, *without: str) -> Path:
    shutil.copytree(BASE, folder, ignore=shutil.ignore_patterns(*without))
    return folder


def test_no_base_transformer(tmp_path, self_forcing):
    base = copy_of_the_base(tmp_path / "base", "diffusion_pytorch_model*")
    pipeline = pipeline_of_the_golden_model(base)
    with pytest.raises(InputError, match="load a checkpoint"):
        pipeline.setup_devices()
    pipeline.load_checkpoint(SELF_FORCING, use_ema=True)
    pipeline.setup_devices()
    assert torch.equal(pipeline.transformer.proj_out.weight, self_forcing.transformer.proj_out.weight)


def test_sizes_off_the_checkpoint(tmp_path):
    """The golden model's heads are not 128 wide, which cannot be seen: a larger one, with the base's text width."""
    sizes = TransformerConfig(
        dim=128, ffn_dim=64, freq_dim=32, text_dim=WanCheckpoint(BASE).config.text_dim, num_heads=1, num_layers=1
    )
    model = empty_transformer(sizes).to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.normal_(std=0.02)
    torch.save({"generator": model.state_dict()}, tmp_path / "model.pt")
    assert TransformerConfig(**infer_sizes(model.state_dict())) == sizes
    base = copy_of_the_base(tmp_path / "base", "diffusion_pytorch_model*", "config.json")
    pipeline = pipeline_of_the_golden_model(base)
    pipeline.load_checkpoint(tmp_path / "model.pt")
    pipeline.setup_devices()
    assert pipeline.transformer.config == sizes
    noise = torch.randn(1, 3, 16, 4, 4)
    assert pipeline.pipeline.inference(noise, ["A cat"]).shape == (1, 9, 3, 32, 32)


def test_portrait(flags, tmp_path, capsys):
    flags += ["--checkpoint_path", str(SELF_FORCING), "--height", "96", "--width", "48", "--use_ema"]
    assert run(RUNNER.main, flags) == 0
    path = next((tmp_path / "out").glob("[!.]*.mp4"))
    assert iio.immeta(path, plugin="FFMPEG")["size"] == (48, 96) and "-height-96-width-48" in path.name


def test_more_than_the_memory(flags, tmp_path, capsys):
    flags += ["--checkpoint_path", str(SELF_FORCING), "--height", "160000", "--width", "160000"]
    assert "GB of memory at least" in refusal(flags, tmp_path, capsys)


def test_size_that_the_processes_cannot_share(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags += ["--checkpoint_path", str(SELF_FORCING), "--height", "48", "--width", "48"]
    assert "the 9 tokens of a frame cannot be split over 2 processes" in refusal(flags, tmp_path, capsys)


# --- the tiny VAE


def test_tiny_vae(flags, tmp_path, capsys):
    flags += ["--checkpoint_path", str(SELF_FORCING), "--use_ema", "--vae", "tiny"]
    assert run(RUNNER.main, [*flags, "--tiny_vae_path", str(GOLDEN / "TAEHV/taew2_1.pth")]) == 0
    assert "-tiny-vae" in next((tmp_path / "out").glob("[!.]*.mp4")).name


def test_tiny_vae_that_is_not_there_or_is_something_else(flags, tmp_path, capsys):
    flags += ["--checkpoint_path", str(SELF_FORCING), "--vae", "tiny"]
    if not (ROOT / "weights/taew2_1.pth").exists():
        assert "weights/taew2_1.pth not found: ./weights/download.sh tiny fetches it" in refusal(
            flags, tmp_path, capsys
        )
    refusal([*flags, "--tiny_vae_path", str(BASE / "Wan2.1_VAE.pth")], tmp_path, capsys)
    torch.save({}, tmp_path / "image.png")
    image = ["--i2v", "--image_path", str(tmp_path / "image.png"), "--num_output_frames", "4"]
    assert "VAE=tiny" in refusal([*flags, "--tiny_vae_path", str(FP8), *image], tmp_path, capsys)


def test_tiny_vae_is_found_beside_the_base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "taew2_1.pth").touch()
    flags = ["--vae", "tiny", "--wan_base_model_path", str(tmp_path / "base"), "--checkpoint_path", str(SELF_FORCING)]
    args = parse_self_forcing(flags)
    assert find_tiny_vae(args, resolve_model_paths(args)[0]) == tmp_path / "taew2_1.pth"


# --- downloads


def test_download_goes_on_where_it_stopped(tmp_path):
    """From a server that has no ranges, all of it; what is complete already is renamed."""
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote/file").write_bytes(bytes(range(256)) * 100)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "remote")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        target = tmp_path / "here/file"
        target.parent.mkdir()
        (tmp_path / "here/file.partial").write_bytes(b"the beginning")
        download.fetch_url(f"http://127.0.0.1:{server.server_port}/file", target)
    finally:
        server.shutdown()
        server.server_close()
    assert target.read_bytes() == (tmp_path / "remote/file").read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["file"]
