"""The rectified-flow noise schedule: x_t = (1 - sigma) * x0 + sigma * noise, and the network predicts noise - x0."""

import torch
from torch import Tensor


class FlowMatchScheduler:
    """The training sigmas of Wan, shifted towards noise, and the few steps of a distilled model on them.

    Args:
        shift: sigma' = shift * sigma / (1 + (shift - 1) * sigma) (arXiv 2403.03206, equation 23).
        denoising_steps: descending timesteps in (0, 1000].
        warp: take ``denoising_steps`` as places in the training schedule (1000 the first) rather than as timesteps.
    """

    num_train_timesteps = 1000

    def __init__(self, shift: float, denoising_steps: list[int], warp: bool):
        sigmas = torch.linspace(1, 0, self.num_train_timesteps + 1)[:-1]
        self.sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        self.timesteps = self.sigmas * self.num_train_timesteps
        steps = torch.tensor(denoising_steps, dtype=torch.float32)
        if warp:
            steps = self.timesteps[self.num_train_timesteps - steps.long()]
        self.denoising_timesteps: list[float] = steps.tolist()
        """What the network is told at each step."""
        self.denoising_sigmas: list[float] = [self.sigma(t) for t in self.denoising_timesteps]
        """How noisy each step's input is."""

    def sigma(self, timestep: float) -> float:
        """The sigma of the training timestep nearest to ``timestep``."""
        return self.sigmas[(self.timesteps - timestep).abs().argmin()].item()

    @staticmethod
    def to_x0(latents: Tensor, flow: Tensor, sigma: float) -> Tensor:
        """The clean latents that ``latents`` at ``sigma`` and the predicted ``flow`` imply, computed in float32."""
        return (latents.float() - sigma * flow.float()).to(latents.dtype)

    @staticmethod
    def add_noise(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
        """Clean latents brought to the noise level ``sigma``."""
        return ((1 - sigma) * x0.float() + sigma * noise.float()).to(x0.dtype)
