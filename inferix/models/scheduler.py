"""The rectified-flow noise schedule: x_t = (1 - sigma) * x0 + sigma * noise; the network predicts noise - x0."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class DenoisingStep(NamedTuple):
    """One step of a few-step sampler."""

    timestep: float
    """What the network is given, in (0, 1000]."""
    sigma: float
    """Noise level of the step's input, in (0, 1]."""


class FlowMatchScheduler:
    """The training sigmas of Wan, shifted towards noise.

    Args:
        shift: sigma' = shift * sigma / (1 + (shift - 1) * sigma) (arXiv 2403.03206, equation 23).
    """

    num_train_timesteps = 1000

    def __init__(self, shift: float):
        sigmas = torch.linspace(1, 0, self.num_train_timesteps + 1)[:-1]
        self.sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        self.timesteps = self.sigmas * self.num_train_timesteps

    def steps(self, timesteps: Sequence[int], warp: bool) -> list[DenoisingStep]:
        """Return the steps at descending ``timesteps`` in (0, 1000].

        With ``warp`` they are indices of the training schedule, counted down from 1000, instead of timesteps.
        """
        given = torch.tensor(timesteps, dtype=torch.float32)
        if warp:
            given = self.timesteps[self.num_train_timesteps - given.long()]
        return [DenoisingStep(t, self.sigma(t)) for t in given.tolist()]

    def sigma(self, timestep: float) -> float:
        """Return the sigma of the training timestep nearest to ``timestep``."""
        return self.sigmas[(self.timesteps - timestep).abs().argmin()].item()

    @staticmethod
    def pred_x0(latents: Tensor, flow: Tensor, sigma: float) -> Tensor:
        """Return the clean latents that ``latents`` at ``sigma`` and the predicted ``flow`` imply, computed in float32."""
        return (latents.float() - sigma * flow.float()).to(latents.dtype)

    @staticmethod
    def add_noise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Return clean latents with noise added to the level ``sigma``, computed in float32."""
        return ((1 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)
