"""Prompts that change on the way, blended and not, over ranks and with positions relative to the window: as one rank has it."""

import pytest
import torch
from forks import run_ranks
from golden_clips import PROMPTS, collect, long_live

from inferix.distributed.context_parallel import shutdown
from inferix.pipelines.storyboard import Prompt

STEERED = [
    PROMPTS[0],
    Prompt(PROMPTS[1], blend=2),
    Prompt(PROMPTS[1], blend=2),
    Prompt(PROMPTS[2], switch="cross_attention"),
    Prompt(PROMPTS[0]),
]
"""The prompt of each block, of which the window holds three."""


def steered(pipeline, prompts: list[str] = STEERED) -> dict[str, torch.Tensor]:
    """Return the latents of a clip with these prompts, a block each; decoding would take longer than all the rest."""
    pipeline.pipeline.vae.streaming_decoder = lambda: lambda latents: latents
    blocks = pipeline.stream(([prompt] for prompt in prompts), 15, torch.Generator().manual_seed(31))
    return {"latents": torch.cat(list(blocks), dim=1)}


def by_ranks(sizes: tuple[int, int]) -> torch.Tensor | None:
    """Be one rank; return the latents in the main process."""
    results: dict[str, torch.Tensor] = {}
    collect(long_live("longlive_infinite", sizes, "auto"), results, "steered", steered)
    shutdown()
    return results.get("steered.latents")


@pytest.fixture(scope="module")
def alone() -> torch.Tensor:
    return steered(long_live("longlive_infinite", (1, 1), "auto"))["latents"]


@pytest.mark.parametrize("sizes", [(2, 1), (2, 2)])
def test_like_one_rank(alone, sizes):
    main_process, *_ = run_ranks(sizes[0] * sizes[1], by_ranks, sizes)
    torch.testing.assert_close(main_process.value, alone, atol=1e-3, rtol=0)


def test_every_prompt_changes_the_video(alone):
    pipeline = long_live("longlive_infinite", (1, 1), "auto")
    for number in range(1, len(STEERED)):
        prompts = STEERED[:number] + [STEERED[number - 1]] * (len(STEERED) - number)
        blocks = zip(steered(pipeline, prompts)["latents"].split(3, dim=1), alone.split(3, dim=1))
        same = [torch.allclose(block, steered_block, atol=1e-3) for block, steered_block in blocks]
        assert same[:number] == [True] * number and (STEERED[number] == STEERED[number - 1] or not same[number])
