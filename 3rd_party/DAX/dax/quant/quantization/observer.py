"""What calibration remembers of a layer's inputs."""

import torch
from torch import Tensor, nn

from dax.quant.functional import absmax_to_scale


class AbsMaxObserver(nn.Module):
    """Keeps the largest magnitude it has seen, in the buffer `absmax`: float32, shape [], negative before the first."""

    def __init__(self, device=None):
        super().__init__()
        self.register_buffer("absmax", torch.tensor(-1.0, device=device))

    def forward(self, x: Tensor) -> None:
        self.absmax.copy_(torch.maximum(self.absmax, x.detach().abs().amax()))

    def scale(self, dtype: torch.dtype) -> Tensor:
        """The activation scale for codes of `dtype`. Raises ValueError if it saw nothing, a NaN or an infinity."""
        if self.absmax < 0:
            raise ValueError("calibration never reached it: run the prepared model before convert")
        if not self.absmax.isfinite():
            raise ValueError("calibration saw a NaN or an infinity")
        return absmax_to_scale(self.absmax.float(), dtype)


def observe_input(module: nn.Module, args: tuple) -> None:
    """A forward pre-hook; a function of its own, because a closure would not follow a copy of the model."""
    module.activation_observer(args[0])
