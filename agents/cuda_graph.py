"""Work on a GPU that the host launches once instead of kernel by kernel."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

WARM_UP_STEPS = 3


def captured(function: Callable[[], Result], device: torch.device) -> Callable[[], Result]:
    """Return what does the same as ``function`` in a single launch, as a CUDA graph.

    Random numbers follow from the generator's seed at each call, as they do in the function.

    Args:
        function: Reads and writes tensors that stay where they are. It is called a few times, since
            compiling and tuning cannot be captured; its result is overwritten by every call.
        device: Where it computes.

    Raises:
        RuntimeError: If it cannot be captured.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function()

    def replay() -> Result:
        graph.replay()
        return result

    return replay
