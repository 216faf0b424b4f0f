"""Random draws."""

from collections.abc import Sequence

import torch
from torch import Tensor


class SampleGenerator(torch.Generator):
    """Draws for some videos of a batch what they get when the whole batch is generated at once.

    So a video's draws do not depend on how many of the batch fit into memory.

    Args:
        device: as for ``torch.Generator``.
    """

    samples: Sequence[int] = ()
    """Numbers, in the whole batch, of the videos that are generated."""
    num_samples: int = 0
    """Videos in the whole batch."""


def randn(shape: Sequence[int], generator: torch.Generator | None, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return one draw of standard normal noise [B, ...], made on the generator's device so that a seed means the same anywhere."""
    source = generator.device if generator is not None else device
    if isinstance(generator, SampleGenerator):
        noise = torch.randn((generator.num_samples, *shape[1:]), generator=generator, device=source, dtype=dtype)
        return noise[list(generator.samples)].to(device)
    return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device)
