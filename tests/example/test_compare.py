"""run_compare.py and compare.sh on the golden model: what is measured, shown and suggested, and what is refused."""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path
from statistics import mean

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml
from conftest import BASE, CAUSVID, ROOT, SELF_FORCING, load_runner, small_config
from forks import python_command
from scripts import SCRIPTS

import compare_report
import run_compare
from inferix.cli.figures import MAX_ERROR
from inferix.cli.main import run
from inferix.cli.prompts import example_prompts
from inferix.config import load_config

RUNNERS = {name: load_runner(name) for name in ("self_forcing", "causvid")}


def flags(folder: Path, **changes: object) -> list[str]:
    """Return the flags of a comparison on the golden model with clips of 3 latent frames."""
    given = {
        "config_path": small_config("self_forcing/configs/self_forcing_dmd", folder),
        "wan_base_model_path": BASE,
        "checkpoint_path": SELF_FORCING,
        "num_output_frames": 3,
        "output_folder": folder / "output",
        "prompt": "A cat; A dog",
    } | changes
    return [word for flag, value in given.items() for word in (f"--{flag}", str(value))]


@pytest.mark.filterwarnings("ignore:no layer of CausalWanTransformer was quantized")  # fp8-outer, of two blocks
def test_comparison(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("ffn: int8\nattn1.to_q: fp8\n")
    names = ["fp8", "int8", "fp8+fp8kv", "fp8-outer"]
    config = small_config("self_forcing/configs/self_forcing_dmd", tmp_path, image_or_video_shape="[1, 9, 16, 4, 6]")
    argv = flags(tmp_path, num_output_frames=6, config_path=config)
    assert run(run_compare.main, [*argv, "--settings", *names, str(tmp_path / "mine.yaml")]) == 0
    output, names = tmp_path / "output", [*names, "mine"]
    shown = {f"compare-{name.replace('+', '-')}.mp4" for name in names} | {"side_by_side.png"}
    written = {"compare.md", "compare.json", "compare.png", "compare_error.png"}
    assert {path.name for path in output.iterdir()} == shown | written

    report = json.loads((output / "compare.json").read_text(), parse_constant=pytest.fail)  # strict: no NaN
    assert report["prompts"] == ["A cat", "A dog"]
    full, *rest = report["settings"]
    assert full["setting"] == "full precision" and full["clip_psnr"] == []
    results = {figures["setting"]: figures for figures in rest}
    assert list(results) == names
    for name, figures in results.items():
        assert np.array(figures["frame_psnr"]).shape == np.array(figures["frame_ssim"]).shape == (2, 21)
        assert np.array(figures["block_error"]).shape == np.array(figures["block_gain"]).shape == (2, 2)
        assert len(figures["seconds"]) == len(figures["clip_psnr"]) == 2
        assert figures["weight_bytes"] <= full["weight_bytes"] and figures["peak_bytes"] > 0
        assert np.max(figures["block_error"]) <= MAX_ERROR.get(name, 0.1)
        assert np.abs(np.array(figures["block_gain"]) - 1).max() < 0.01
    errors = {name: np.mean(figures["block_error"]) for name, figures in results.items()}
    assert 0 < errors["int8"] < errors["fp8"] / 1.5 and errors["fp8+fp8kv"] != errors["fp8"]
    sizes = {name: figures["weight_bytes"] for name, figures in results.items()}
    assert sizes["fp8"] < sizes["mine"] < full["weight_bytes"]
    # the model has two blocks, the first and the last: nothing is quantized, and nothing differs
    assert results["fp8-outer"]["clip_psnr"] == [100, 100] and sizes["fp8-outer"] == full["weight_bytes"]
    assert errors["fp8-outer"] == 0

    markdown = (output / "compare.md").read_text()
    assert markdown in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if "|" in line]
    assert [row[0] for row in rows[2 : 3 + len(names)]] == ["full precision", *names]
    assert rows[3][1] == f"{mean(results['fp8']['clip_psnr']):.2f}" and rows[3][-2].endswith(" MB")
    by_block = [f"{error:.4f}" for error in np.mean(results["fp8"]["block_error"], axis=0)]
    assert ["fp8", *by_block] in rows

    video = np.stack(list(iio.imiter(output / "compare-int8.mp4", plugin="FFMPEG")))
    assert video.shape == (2 * 21, 256 + 24, 3 * 384, 3)  # 32x48, eight times as large, below the labels
    left, middle, right = (video[::9, 24:, i * 384 : (i + 1) * 384].astype(int) for i in range(3))
    assert left.std() > 10 and abs(left - middle).mean() < 3 and right.mean() < left.mean()
    assert iio.imread(output / "side_by_side.png").shape == (len(names) * 280, 3 * 384, 3)
    assert iio.imread(output / "compare.png").std() > 10 and iio.imread(output / "compare_error.png").std() > 10


def test_the_reference_is_what_the_runner_makes(self_forcing, tmp_path):
    """Same prompt, same seed: the video of the pipeline's own ``generate``."""
    parser_flags = flags(tmp_path, prompt="A cat", seed=3)
    args = run_compare.parse_arguments(parser_flags)
    comparison = run_compare.Comparison(run_compare.load(args), args.prompts, args.seed, args.num_output_frames)
    comparison.measure(run_compare.FULL)
    expected = self_forcing.generate(["A cat"], 3, torch.Generator().manual_seed(3))[0]
    torch.testing.assert_close(comparison.reference[0].video, expected, rtol=0, atol=1e-6)


def test_the_metrics_are_what_they_are_called():
    torch.manual_seed(0)
    reference = torch.rand(30, 3, 32, 48)
    noise = 0.01 * torch.randn(reference.shape)
    noise[10] *= 10
    latents = torch.randn(6, 16, 4, 6)
    figures = compare_report.Figures("noise", 1, seconds=[1.0])
    weaker = torch.cat([latents[:3], 0.85 * latents[3:]])
    made = compare_report.Clip(reference + noise, weaker)
    figures.add(compare_report.Clip(reference, latents), made, 3, torch.device("cpu"))
    assert figures.clip_psnr[0] == pytest.approx(-10 * noise.double().square().mean().log10().item(), abs=1e-3)
    assert figures.mse == pytest.approx(noise.double().square().mean().item(), rel=1e-3)
    assert figures.frame_psnr[0][3] == pytest.approx(-10 * noise[3].square().mean().log10().item(), abs=1e-3)
    assert np.argmin(figures.frame_psnr[0]) == np.argmin(figures.frame_ssim[0]) == 10
    assert 0.9 < figures.frame_ssim[0][0] < 1
    # a loss of magnitude, which leaves the direction as it was, is seen and marked
    assert figures.block_error[0] == pytest.approx([0, 0.15]) and figures.block_gain[0] == pytest.approx([1, 0.85])
    text = compare_report.report_text([figures])
    assert (
        "| noise | 0.0000 | 0.1500 **above 0.1** |" in text and "| noise | 1.0000 | 0.8500 **not 1 ± 0.02** |" in text
    )


def test_panels():
    reference, video = torch.full((2, 3, 128, 160), 0.5), torch.full((2, 3, 128, 160), 0.51)
    panels = compare_report.side_by_side(reference, video, "int8")
    assert panels.shape == (2, 3, 24 + 256, 3 * 320)
    for panel, value in zip(panels[:, :, 24:].split(320, dim=3), (0.5, 0.51, 0.08)):
        torch.testing.assert_close(panel, torch.full_like(panel, value), rtol=0, atol=1e-6)
    for text in panels[0, :, :24].split(320, dim=2):  # a label above each
        assert text.max() == 1 and text.min() < 0.5


def test_prompts_that_a_small_model_knows():
    config = load_config(ROOT / "example/self_forcing/configs/self_forcing_demo.yaml")
    prompts = example_prompts(config, 24)
    assert len(set(prompts)) == 24
    assert all(len({prompt.split()[i] for prompt in prompts}) > 1 for i in (1, 2, 5, 10))
    assert len(example_prompts(config, 1000)) == 216


@pytest.fixture(scope="module")
def suggested(tmp_path_factory) -> tuple[Path, str]:
    """The folder and what was printed, of a search for the qconfig that keeps 42 dB, as compare.sh starts it."""
    folder = tmp_path_factory.mktemp("sensitivity")
    argv = flags(folder, prompt="A cat", psnr=42)
    program, *argv = python_command([SCRIPTS / "compare.sh", *argv], {"SENSITIVITY": "fp8"}, folder)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", [program, *argv])
        runpy.run_path(program, run_name="__main__")
    assert end.value.code == 0
    return folder / "output", printed.getvalue()


def test_sensitivity_ranks_every_group(suggested, self_forcing):
    folder, printed = suggested
    groups = [f"blocks.{i}.{part}" for i in range(2) for part in ("attn1", "attn2", "ffn")]
    figures = json.loads((folder / "sensitivity.json").read_text())["settings"]
    assert sorted(group["setting"] for group in figures) == sorted([*groups, "condition_embedder", "proj_out"])
    full = sum(weight.nbytes for weight in self_forcing.transformer.parameters())
    harm = [10 ** (-group["clip_psnr"][0] / 10) / (full - group["weight_bytes"]) for group in figures]
    assert harm == sorted(harm, reverse=True) and min(harm) > 0
    assert all(0 < group["block_error"][0][0] < 0.1 for group in figures)
    assert printed.count("Relative error of the latents:") == 1 and (folder / "sensitivity_error.png").exists()


def test_the_suggestion_keeps_its_word_and_both_runners_take_it(suggested, tmp_path):
    folder, printed = suggested
    path = folder / "suggested.yaml"
    assert printed.endswith(path.read_text())
    promise, content = path.read_text().splitlines()[0], yaml.safe_load(path.read_text())
    assert content.pop("") == "fp8" and content and set(content.values()) == {None}
    assert run(run_compare.main, [*flags(tmp_path, prompt="A cat"), "--settings", str(path)]) == 0
    _, figures = json.loads((tmp_path / "output/compare.json").read_text())["settings"]
    assert figures["clip_psnr"][0] >= 42 and f"PSNR {figures['clip_psnr'][0]:.1f} dB" in promise

    runner_flags = {"prompt": "A cat", "qconfig": path, "output_folder": tmp_path / "videos"}
    assert run(RUNNERS["self_forcing"].main, flags(tmp_path, **runner_flags)) == 0
    argv = flags(tmp_path, **runner_flags, config_path=small_config("causvid/configs/causvid", tmp_path))
    argv = argv[:4] + ["--checkpoint_folder", str(CAUSVID), "--num_rollout", "1"] + argv[8:]
    assert run(RUNNERS["causvid"].main, argv) == 0
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2


def test_causvid(tmp_path):
    """The other model, whose config has other steps: one rollout of it."""
    config = small_config("causvid/configs/causvid", tmp_path)
    argv = flags(tmp_path, prompt="A cat", config_path=config, checkpoint_path=CAUSVID, model="causvid")
    assert run(run_compare.main, [*argv, "--settings", "int8"]) == 0
    _, figures = json.loads((tmp_path / "output/compare.json").read_text())["settings"]
    assert 30 < figures["clip_psnr"][0] < 100


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"settings": "int4"}, "int4 is neither a name nor a file"),
        ({"settings": "bad.yaml"}, "bad.yaml: 'blocks'"),
        ({"settings": "unknown.yaml"}, "no module block"),
        ({"num_output_frames": 4}, "blocks of 3"),
        ({"num_output_frames": 0}, "--num_output_frames"),
        ({"num_prompts": 0}, "--num_prompts"),
        ({"prompt": ";"}, "the prompt is empty"),
        ({"sensitivity": "int4"}, "--sensitivity"),
        ({"checkpoint_path": "nowhere.pt"}, "nowhere.pt not found"),
        ({"output_folder": "bad.yaml"}, "choose another folder"),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, changes, complaint):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("blocks: int4")
    Path("unknown.yaml").write_text("block: int8")
    settings = {"settings": "fp8"} | changes
    code = run(run_compare.main, flags(tmp_path, **settings))
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith("error: ") and complaint in error
    assert not list(tmp_path.rglob("*.mp4")) and not list(tmp_path.rglob("compare.*"))


def test_every_flag_has_a_variable(capsys):
    with pytest.raises(SystemExit):
        run_compare.main(["--help"])
    words = capsys.readouterr().out.split()
    names = {word.strip("[],:") for word in words if word.startswith("[--")} - {"--help"}
    script = (ROOT / "example/quantization/compare.sh").read_text()
    readme = (ROOT / "example/quantization/README.md").read_text()
    assert len(names) > 12
    for flag in names:
        assert f"+{flag} " in script and f"${flag[2:].upper()}" in script, flag
        assert f"`{flag[2:].upper()}" in readme or f"{flag[2:].upper()}=" in readme, flag
