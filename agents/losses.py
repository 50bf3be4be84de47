"""The training loss."""

from torch import Tensor


def masked_action_loss(predicted: Tensor, actions: Tensor, mask: Tensor, reach: Tensor) -> Tensor:
    """Return the squared action error, meaned over features and summed over valid steps.

    The loss is this divided by the count of valid steps. (Averaging over all positions, as CORL and
    d3rlpy do, makes the learning rate depend on the padding.) The division is left to the caller,
    because data-parallel ranks divide by the global count.

    Args:
        predicted: (B, T, A).
        actions: (B, T, A); may be anything where not valid, NaN included.
        mask: (B, T) bool.
        reach: Half the width of the action bounds, (A,): errors are counted in units of it.
    """
    error = ((predicted - actions) / reach).masked_fill(~mask.unsqueeze(-1), 0.0)
    return error.square().mean(-1).sum()
