"""Where tensors lie."""

import os

import torch
import torch.distributed as dist

from minrl.errors import ConfigError


def choose_device(name: torch.device | str) -> torch.device:
    """Return the device, "auto" being a GPU if there is one, each process of torchrun its own.

    Raises:
        ConfigError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and dist.is_torchelastic_launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(name)!r} cannot be used: {reason}") from error
