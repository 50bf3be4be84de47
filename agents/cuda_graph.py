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
        # On a stream of this device: the default one is of the device captured on first. Other
        # threads may go on calling CUDA meanwhile.
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError:
            torch.cuda.set_stream(before)  # which a capture that fails at its end does not
            raise

    def replay() -> Result:
        graph.replay()
        return result

    return replay
