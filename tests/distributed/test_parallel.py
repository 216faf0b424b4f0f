"""Several processes share a video: real ones that talk through gloo."""

import signal

import imageio.v3 as iio
import pytest
import torch
from conftest import GOLDEN
from forks import ForkedScript, python_command, run_ranks
from golden_clips import golden_clips
from safetensors.torch import load_file
from scripts import SCRIPTS, assert_plays_in_a_browser, run_here, run_runner, self_forcing_env, written  # noqa: F401

import launch
from inferix import InputError, ParallelConfig
from inferix.cli.devices import parallel_config
from inferix.cli.figures import relative_error_and_gain as relative_error
from inferix.distributed.context_parallel import check_sizes


@pytest.fixture(scope="module")
def clips() -> dict[str, torch.Tensor]:
    """Golden clips made by one process (1x1) and by two and four, each named by its sizes, Ulysses x ring."""
    clips = golden_clips("1x1")
    for num_ranks, ways in ((2, ("2x1", "1x2")), (4, ("2x2",))):
        clips |= run_ranks(num_ranks, golden_clips, *ways, seconds=240)[0].value
    return clips


pytestmark = pytest.mark.timeout(500)  # the first test waits for all clips
WAYS = ["2x1", "1x2", "2x2"]


@pytest.mark.parametrize("way", WAYS)
def test_full_precision(clips, way):
    """The golden data, and what one process computes."""
    golden = load_file(GOLDEN / "expected/self_forcing.safetensors")
    for name, tolerance in (("latents", 1e-3), ("video", 5e-3)):
        clip = clips[f"{way}.self_forcing.{name}"]
        torch.testing.assert_close(clip, golden[name].float(), rtol=0, atol=tolerance)
        torch.testing.assert_close(clip, clips[f"1x1.self_forcing.{name}"], rtol=0, atol=1e-4)


def test_causvid_continued_from_its_last_frames(clips):
    golden = load_file(GOLDEN / "expected/causvid.safetensors")
    for rollout in ("latents_0", "latents_1"):
        clip = clips[f"2x2.causvid.{rollout}"]
        torch.testing.assert_close(clip, golden[rollout], rtol=0, atol=1e-3)
        torch.testing.assert_close(clip, clips[f"1x1.causvid.{rollout}"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("way", "quantized"), [("2x1", "fp8"), ("1x2", "fp8"), ("2x2", "fp8"), ("2x2", "int8")])
def test_quantized(clips, way, quantized):
    """The cache offloaded besides; fp8 with a scale for each tensor, of which every rank has a part."""
    error, gain = relative_error(*(clips[f"{w}.{quantized}.latents"] for w in (way, "1x1")))
    assert error < 0.03 and abs(gain - 1) < 0.005  # values that round the other way
    if quantized == "fp8":
        first, alone = (clips[f"{w}.fp8.scales"][:1] for w in (way, "1x1"))  # later ones follow what was rounded before
        torch.testing.assert_close(first, alone, rtol=1e-4, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_prompt_switches_and_relative_positions(clips, way):
    """In full precision the golden data; with the 8-bit cache what one process computes: the means are the same."""
    for name, frames in (("interactive", 18), ("infinite", 15)):
        golden = load_file(GOLDEN / f"expected/longlive_{name}.safetensors")["latents"][:, :frames]
        torch.testing.assert_close(clips[f"{way}.{name}.auto.latents"], golden, rtol=0, atol=1e-3)
    error, gain = relative_error(*(clips[f"{w}.interactive.fp8.latents"] for w in (way, "1x1")))
    assert error < 0.03 and abs(gain - 1) < 0.005


@pytest.mark.parametrize(
    ("sizes", "tokens", "complaint"),
    [
        ((8, 1), 1560, "does not divide the 12 attention heads; .*: 1 x 8, 2 x 4, 4 x 2$"),
        ((1, 7), 1560, "cannot be split over 7 processes; .*: 1, 2, 3, 4, 5, 6, 8, 10, 12, 13$"),
        ((4, 4), 1560, "cannot be split over 16 processes; .* 12, 13, 15, 20, 24, 26, 30$"),
    ],
)
def test_sizes_that_do_not_divide(sizes, tokens, complaint):
    config = ParallelConfig(*sizes, world_size=sizes[0] * sizes[1])
    with pytest.raises(InputError, match=complaint):
        check_sizes(config, num_heads=12, tokens_per_frame=tokens)


@pytest.mark.parametrize(
    ("given", "world", "sizes"),
    [((None, None), 4, (2, 2)), ((None, 4), 4, (1, 4)), ((1, None), 4, (1, 4)), ((None, None), 1, (1, 1))],
)
def test_sizes_not_given(given, world, sizes, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    config = parallel_config(*given, num_heads=2)
    assert (config.ulysses_size, config.ring_size) == sizes


def test_script(self_forcing_env, tmp_path):  # noqa: F811
    """Two processes started by the script write what one process writes, and one of them speaks."""
    env = self_forcing_env | {"PROMPT": "A cat; A dog", "ENABLE_KV_OFFLOAD": "1", "NO_QUANTIZE": "1"}
    env |= {"NUM_OUTPUT_FRAMES": "6"}
    command = [SCRIPTS / "self_forcing_quantized.sh"]
    with ForkedScript(command, env | {"NPROC": "2"}, cwd=tmp_path, num_ranks=2) as process:
        result = process.wait(100)
    paths = written(result, tmp_path)
    assert result.stdout.count("seconds ") == 1 and result.stdout.count("file written") == 2
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr
    assert run_here("self_forcing_quantized.sh", env | {"OUTPUT_FOLDER": "alone"}, tmp_path).returncode == 0
    assert len(paths) == 2
    for path in paths:
        assert_plays_in_a_browser(path, 21)
        videos = [iio.imread(p, plugin="FFMPEG").astype(int) for p in (path, tmp_path / "alone" / path.name)]
        assert videos[0].shape == (21, 64, 96, 3) and videos[0].std() > 10
        assert abs(videos[0] - videos[1]).mean() < 0.5  # of 255; sums in another order, through a lossy encoder


def test_folder_that_cannot_be_written(self_forcing_env, tmp_path):  # noqa: F811
    """Of two processes the first one finds it, and it alone speaks."""
    env = self_forcing_env | {"OUTPUT_FOLDER": "/proc/nowhere"}
    _launch, _runner, *flags = python_command([SCRIPTS / "self_forcing_quantized.sh"], env, tmp_path)
    first, second = run_ranks(2, run_runner, tmp_path, flags)
    assert (first.value, second.value, second.output) == (2, 0, "")
    assert first.output.startswith("error: ") and first.output.endswith("choose another folder\n")
    assert first.output.count("\n") == 1


@pytest.mark.parametrize(
    ("rank_1", "code", "output"),
    [
        ("import sys; sys.exit(2)", 2, ""),  # it has said why
        (
            "import os; os.kill(os.getpid(), 9)",
            128 + signal.SIGKILL,
            "error: process 1 of 2 was ended by SIGKILL\n",
        ),
    ],
    ids=["failed", "killed"],
)
def test_exit_codes(rank_1, code, output, tmp_path):
    """The launcher ends with the code of the rank that has failed, and ends the other one."""
    runner = tmp_path / "runner.py"
    program = f"import os, time\nif os.environ['RANK'] == '1': {rank_1}\ntime.sleep(50)\nopen(__file__ + ' ended', 'w')"
    runner.write_text(program)
    (launcher,) = run_ranks(1, launch.torchrun, 2, [str(runner)])
    assert (launcher.value, launcher.output, list(tmp_path.iterdir())) == (code, output, [runner])


def test_a_rank_that_dies_ends_the_job(self_forcing_env, tmp_path):  # noqa: F811
    env = self_forcing_env | {"NPROC": "2", "NUM_OUTPUT_FRAMES": "3000"}
    videos = tmp_path / "my videos"
    with ForkedScript([SCRIPTS / "self_forcing_quantized.sh"], env, cwd=tmp_path, num_ranks=2) as process:
        process.wait_until(lambda: videos.is_dir() and any(path.stat().st_size for path in videos.iterdir()))
        (victim,) = process.descendants(RANK="1")
        victim.kill()
        result = process.wait(60)
    assert result.returncode == 128 + signal.SIGKILL
    assert "error: process 1 of 2 was ended by SIGKILL" in result.stderr
    assert not list(videos.iterdir())  # the main process had time to clean up
