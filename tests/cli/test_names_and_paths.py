"""What files are called, which model is taken, and which prompts: from the flags alone, without a model."""

from pathlib import Path

import pytest
from conftest import BASE, CAUSVID, ROOT, SELF_FORCING, small_config

from inferix import InputError
from inferix.cli import model_paths
from inferix.cli.arguments import parse_causvid, parse_self_forcing
from inferix.cli.file_names import MAX_BYTES, prompt_stem, prompt_stems, settings_suffix
from inferix.cli.model_paths import DEMO, REAL, ModelPaths, default_vae, find_model_paths
from inferix.cli.presets import RemoteFile
from inferix.cli.prompts import example_prompt, example_prompts, read_prompts
from inferix.config import load_config


def self_forcing(*argv: object):
    return parse_self_forcing([str(word) for word in argv])


def causvid(*argv: object):
    return parse_causvid([str(word) for word in argv])


# --- names


def test_long_prompts_differ():
    long = "a very long prompt " * 20
    one, other = prompt_stem(long + "of a cat"), prompt_stem(long + "of a dog")
    assert one != other and one[:70] == other[:70] and max(map(len, (one, other))) <= MAX_BYTES + 7
    assert prompt_stem("A cat, asleep.") == "A-cat-asleep"


def test_equal_words_get_their_number():
    assert prompt_stems(["A cat", "A dog", "A cat!"], False) == ["A-cat-0", "A-dog", "A-cat-2"]
    assert prompt_stems(["A cat", "A dog"], True) == ["0", "1"]


@pytest.mark.parametrize(
    ("args", "suffix"),
    [
        (self_forcing(), ""),
        (self_forcing("--checkpoint_path", DEMO["self_forcing"].checkpoint, "--quant_type", "fp8"), ""),
        (self_forcing("--no_quantize"), "-full-precision"),
        (self_forcing("--quant_type", "int8", "--quant_granularity", "per_tensor"), "-int8-per-tensor"),
        (self_forcing("--kv_cache_dtype", "fp8", "--low_memory"), "-fp8-cache-low-memory"),
        (self_forcing("--num_output_frames", 240), "-latents-240"),
        (self_forcing("--i2v", "--image_path", ROOT / "docs/demo_strip.png"), "-from-demo_strip"),
        (self_forcing("--checkpoint_path", SELF_FORCING), "-self_forcing_dmd"),
        (self_forcing("--load_quantized", ROOT / "weights"), "-weights"),
        (self_forcing("--qconfig", ROOT / "example/self_forcing/configs/self_forcing_demo.yaml"), "-self_forcing_demo"),
        (causvid(), ""),
        (causvid("--checkpoint_folder", DEMO["causvid"].checkpoint.parent), ""),
        (causvid("--checkpoint_folder", CAUSVID), "-autoregressive_checkpoint"),
        (causvid("--num_rollout", 6, "--num_overlap_frames", 6), "-rollouts-6-overlap-6"),
    ],
)
def test_a_name_tells_what_is_not_the_default(args, suffix):
    assert settings_suffix(args) == suffix


# --- the model

WITHOUT_PUBLIC_WEIGHTS = pytest.mark.skipif(REAL["causvid"].base.exists(), reason="the public weights are there")


@WITHOUT_PUBLIC_WEIGHTS
def test_the_demo_takes_the_place_of_weights_that_are_not_there(capsys):
    assert find_model_paths(self_forcing()) == DEMO["self_forcing"]
    assert "using the small demo model" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["base", "checkpoint", "config"])
def test_one_path_of_the_demo_brings_the_others(flag, capsys):
    flags = {"base": "--wan_base_model_path", "checkpoint": "--checkpoint_path", "config": "--config_path"}
    assert find_model_paths(self_forcing(flags[flag], getattr(DEMO["self_forcing"], flag))) == DEMO["self_forcing"]
    assert capsys.readouterr().out == ""


def test_a_size_that_the_model_was_not_made_for_is_said(capsys):
    demo, real = DEMO["self_forcing"], REAL["self_forcing"]
    paths = find_model_paths(self_forcing("--wan_base_model_path", demo.base, "--config_path", real.config))
    assert paths == ModelPaths(real.config, demo.base, demo.checkpoint)
    assert "was made for 128x128, not 832x480" in capsys.readouterr().out


@WITHOUT_PUBLIC_WEIGHTS
def test_a_default_that_is_not_there_is_not_blamed_on_what_was_set():
    with pytest.raises(InputError, match="belongs to the CHECKPOINT_PATH you set; set WAN_BASE_MODEL_PATH"):
        find_model_paths(self_forcing("--checkpoint_path", SELF_FORCING))
    with pytest.raises(InputError, match="WAN_BASE_MODEL_PATH you set; set CHECKPOINT_FOLDER"):
        find_model_paths(causvid("--wan_base_model_path", BASE))


@pytest.mark.parametrize(("spelled", "found"), [("causvid", "CausVid"), ("CausVid", "causvid")])
def test_either_spelling_of_causvid(tmp_path, monkeypatch, spelled, found):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights" / found / "autoregressive_checkpoint").mkdir(parents=True)
    for below in ("", "/autoregressive_checkpoint"):
        args = causvid("--checkpoint_folder", f"./weights/{spelled}{below}")
        assert args.checkpoint_folder == Path(f"weights/{found}{below}")
    with pytest.raises(InputError, match="weights/other not found"):
        causvid("--checkpoint_folder", "weights/other")


# --- prompts


def test_prompt_files(tmp_path):
    (tmp_path / "prompts.txt").write_text("A cat\n\n A dog; asleep \n")
    (tmp_path / "prompts.yaml").write_text("prompts: [A cat, A dog; asleep]")
    for name in ("prompts.txt", "prompts.yaml"):
        assert read_prompts(tmp_path / name) == ["A cat", "A dog; asleep"]


def test_prompts_of_a_template(tmp_path):
    path = small_config("self_forcing/configs/self_forcing_dmd", tmp_path, prompt_template="'A {red|blue} {dot|box}'")
    config = load_config(path)
    assert example_prompt(config) == "A red dot"
    assert sorted(example_prompts(config, 9)) == ["A blue box", "A blue dot", "A red box", "A red dot"]
    assert example_prompts(config, 2) == example_prompts(config, 2) and len(example_prompts(config, 2)) == 2


# --- the VAE


def test_the_page_without_a_gpu_decodes_with_the_tiny_vae(tmp_path, monkeypatch):
    demo, without_tiny = DEMO["self_forcing"], ModelPaths(tmp_path, tmp_path / "base", tmp_path)
    page, image = ["--enable_webrtc"], ["--enable_webrtc", "--i2v", "--image_path", ROOT / "README.md"]
    monkeypatch.setattr(model_paths, "TINY_VAE", RemoteFile("", "taew2_1.pth", str(tmp_path)))
    for gpu, expected in ((False, "tiny"), (True, "full")):
        monkeypatch.setattr(model_paths, "has_gpu", lambda gpu=gpu: gpu)
        assert default_vae(self_forcing(*page), demo) == expected
        assert default_vae(causvid(*page), DEMO["causvid"]) == expected
        others = ([], demo), (image, demo), (page, without_tiny)
        assert [default_vae(self_forcing(*flags), paths) for flags, paths in others] == ["full"] * 3
