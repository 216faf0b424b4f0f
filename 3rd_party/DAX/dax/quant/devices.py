"""Which 8-bit types a device can multiply."""

import torch


def check_device(dtype: torch.dtype, device: torch.device) -> None:
    """Raises RuntimeError if `device` is a GPU that cannot multiply `dtype`."""
    if dtype == torch.int8 or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise RuntimeError(
            f"fp8 needs a GPU of compute capability 8.9 or more; {device} has {capability[0]}.{capability[1]}: use int8"
        )
