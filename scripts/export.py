"""``minrl export``: a trained run's policy as one file that runs without minrl."""

from pathlib import Path

from minrl.agents.decision_agent import DecisionAgent
from minrl.agents.export import TOLERANCE, export_agent


def export_command(
    run: Path,
    /,
    to: str = "onnx",
    checkpoint: str = "last",
    output: Path | None = None,
    recurrent: bool = False,
) -> None:
    """Write a trained agent's policy as one file that runs without minrl, and check it.

    The file computes one step for any number of environments: (observation, target_return,
    timestep, reset, state) -> (action, next_state). It holds as JSON what a user needs to know.

    Args:
        run: Folder of the run, or a .safetensors file.
        to: onnx (for ONNX Runtime and others) or pt2 (for torch.export.load).
        checkpoint: last or best.
        output: The file; by default policy.onnx or policy.pt2 in the run's folder.
        recurrent: Export even an agent that acts from windows (refresh-every above 0), as if
            that were 0.
    """
    agent = DecisionAgent.load(run, checkpoint=checkpoint)
    if recurrent:
        agent.refresh_every = 0
    folder = run if run.is_dir() else run.parent
    path = output or folder / f"policy.{to}"
    difference = export_agent(agent, path, to)
    print(
        f"{path} ({path.stat().st_size / 2**20:.1f} MiB) acts as the model does: largest "
        f"difference of an action {difference:.1e} of half its range, at most {TOLERANCE:.0e} is "
        "allowed"
    )
