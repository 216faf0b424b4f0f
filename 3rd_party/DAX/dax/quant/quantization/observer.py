"""Observers: collect the range of a layer's inputs during calibration."""

from typing import Any

import torch
from torch import Tensor, nn

from dax.quant.functional import absmax_to_scale


class AbsMaxObserver(nn.Module):
    """Keep the largest magnitude seen, in the buffer `absmax`: float32, shape [], negative before the first."""

    absmax: Tensor

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("absmax", torch.tensor(-1.0, device=device))

    def forward(self, x: Tensor) -> None:
        if x.numel():
            self.absmax.copy_(torch.maximum(self.absmax, x.detach().abs().amax()))

    def scale(self, dtype: torch.dtype) -> Tensor:
        """Return the activation scale for `dtype`. Raises ValueError if no input, a NaN or an infinity was observed."""
        if self.absmax < 0:
            raise ValueError("calibration never reached it: run the prepared model before convert")
        if not self.absmax.isfinite():
            raise ValueError("calibration saw a NaN or an infinity")
        return absmax_to_scale(self.absmax.float(), dtype)


def observe_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook: pass the input of `module` to its observer.

    It is a function of its own, because a closure would not follow a copy of the model.
    """
    module.activation_observer(args[0] if args else kwargs["input"])
