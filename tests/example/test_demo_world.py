"""The synthetic world and the checker of what a video shows: right videos pass, wrong ones do not."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "example/demo_model"))
from score import score
from world import BACKGROUNDS, COLORS, SCENES, SHAPES, SPEED, STARTS, Scene, centers, render

FRAMES = torch.arange(41)
SCENE = Scene("red", "circle", "from left to right", "white")


def wrong(video: torch.Tensor, scene: Scene = SCENE) -> set[str]:
    """The criteria that a video fails."""
    return {name for name, right in score(video, scene).items() if not right}


def test_every_prompt_is_another():
    assert len({scene.prompt for scene in SCENES}) == 216
    assert SCENE.prompt == "A red circle moves from left to right on a white background"


def test_objects_move_steadily_and_wrap_around():
    path = centers(SCENE, (112, 64), torch.arange(128).float())
    assert path[0].tolist() == [112, 64] and path[8].tolist() == [0, 64]
    torch.testing.assert_close(
        render(SCENE, (112, 64), torch.tensor([3])), render(SCENE, (112, 64), torch.tensor([67]))
    )


def test_ground_truth_of_every_prompt_passes():
    failed = {
        scene.prompt
        for i, scene in enumerate(SCENES)
        if wrong(render(scene, STARTS[i % len(STARTS)], FRAMES[:3]), scene)
    }
    assert not failed


@pytest.mark.parametrize("start", STARTS[::5])
def test_whole_clips_pass_from_every_start(start):
    assert not wrong(render(SCENE, start, FRAMES), SCENE)


def test_slightly_noisy_video_passes():
    video = render(SCENE, STARTS[0], FRAMES)
    assert not wrong((video + 0.03 * torch.randn(video.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1))


@pytest.mark.parametrize("color", COLORS)
def test_colour_is_told_apart(color):
    assert wrong(render(replace(SCENE, color=color), STARTS[0], FRAMES[:17])) == (
        {"colour"} if color != "red" else set()
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_is_told_apart(shape):
    video = render(replace(SCENE, shape=shape), STARTS[0], FRAMES[:17])
    assert wrong(video) == ({"shape"} if shape != "circle" else set())


@pytest.mark.parametrize("direction", ("from right to left", "from top to bottom", "from bottom to top"))
def test_direction_is_told_apart(direction):
    assert wrong(render(replace(SCENE, direction=direction), STARTS[0], FRAMES)) == {"direction"}


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_background_is_told_apart(background):
    video = render(replace(SCENE, background=background), STARTS[0], FRAMES[:17])
    assert wrong(video) == ({"background"} if background != "white" else set())


def test_a_video_that_stands_still_has_no_direction():
    assert wrong(render(SCENE, STARTS[0], torch.zeros(len(FRAMES)))) == {"direction"}


def test_a_video_that_stops_half_way_has_no_direction():
    assert wrong(render(SCENE, STARTS[0], FRAMES.clamp(max=17))) == {"direction"}


def test_an_empty_video_fails_all_but_background():
    assert wrong(torch.ones(len(FRAMES), 3, 128, 128)) == {"colour", "shape", "direction"}


def test_two_objects_fail():
    left, right = render(SCENE, (24, 64), FRAMES), render(SCENE, (88, 64), FRAMES)
    assert {"shape", "direction"} <= wrong(torch.minimum(left, right))
    blue = render(replace(SCENE, color="blue"), (88, 64), FRAMES)
    assert {"shape", "direction"} <= wrong(torch.where(blue < 1, blue, left))


def test_an_object_that_jumps_about_fails():
    video = render(SCENE, STARTS[0], FRAMES)
    order = torch.randperm(len(FRAMES), generator=torch.Generator().manual_seed(0))
    assert "direction" in wrong(video[order])


def test_noise_fails():
    assert {"colour", "shape", "direction"} <= wrong(torch.rand(len(FRAMES), 3, 128, 128))


def test_a_video_of_other_speed_is_judged_by_distance():
    assert not wrong(render(SCENE, STARTS[0], FRAMES * 3 // 4))
    assert wrong(render(SCENE, STARTS[0], FRAMES * 2 * SPEED)) == {"direction"}
