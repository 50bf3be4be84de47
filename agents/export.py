"""A trained agent as one file that runs without minrl: ONNX, or PyTorch's exported programs.

The artefact is the policy of one step, for any number of environments at once:

    action, next_state = policy(observation, target_return, timestep, reset, state)

It holds normalisation, bounds and the learned initial state. An episode starts where ``reset`` is
true, whatever the state: begin with zeros. What a caller needs to know is JSON in the file, see
:func:`description`.
"""

import contextlib
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minrl import __version__
from minrl.agents.decision_agent import DecisionAgent
from minrl.agents.step_policy import StepPolicy
from minrl.agents.trajectory import TrajectoryModel
from minrl.errors import ConfigError, ExportError

FORMATS = ("onnx", "pt2")
DESCRIPTION = "minrl.json"  # the name of the JSON in a .pt2 file
TOLERANCE = 1e-5

INPUTS = ("observation", "target_return", "timestep", "reset", "state")
OUTPUTS = ("action", "next_state")

HOW_TO = (
    "state: zeros before the first step, then the next_state of the step before. reset: true where "
    "an episode starts. target_return: the target return where an episode starts, then {later}. "
    "timestep: {timestep}."
)
LATER_RETURNS = {
    "return-to-go": "less by the reward of each step",
    "return": "the same at every step",
}
TIMESTEPS = {True: "0 where an episode starts, then one more each step", False: "not looked at"}

# Steps, and chance of a reset at each, of the rollouts that an artefact is checked on.
CHECK_BATCHES, CHECK_STEPS, CHECK_RESETS = (1, 3), 40, 0.1

Policy = Callable[..., tuple[np.ndarray, np.ndarray]]


def description(agent: DecisionAgent) -> dict:
    """Return what the user of an artefact needs to know, JSON-serialisable."""
    model = agent.model
    sizes = {
        "observation": ["float32", ["batch", model.observation_size]],
        "target_return": ["float32", ["batch"]],
        "timestep": ["int64", ["batch"]],
        "reset": ["bool", ["batch"]],
        "state": ["float32", ["batch", StepPolicy(model).state_size]],
    }
    return {
        "minrl": __version__,
        "inputs": sizes,
        "outputs": {
            "action": ["float32", ["batch", model.action_size]],
            "next_state": sizes["state"],
        },
        "how_to": HOW_TO.format(
            later=LATER_RETURNS[model.config.condition],
            timestep=TIMESTEPS[model.embed_timestep is not None],
        ),
        "target_return": agent.target_return,
        "action_low": model.action_low.tolist(),
        "action_high": model.action_high.tolist(),
        "acting": "recurrent",
        "environment": agent.info.get("environment"),
        "dataset": agent.info.get("dataset", {}).get("dataset_id"),
        "step": agent.info.get("step"),
        "model": model.describe()["config"],
    }


def export_agent(agent: DecisionAgent, path: Path | str, to: str) -> float:
    """Write the policy of one step and check that the file acts as the agent does.

    Args:
        agent: On the CPU.
        path: The file to write.
        to: "onnx" or "pt2".

    Returns:
        The largest difference between the actions of file and agent, 1 being half the range
        between the bounds of an action.

    Raises:
        ConfigError: If format or folder is unknown or the agent acts from windows.
        ExportError: If a library is missing or the file acts differently; no file is left then.
    """
    if to not in FORMATS:
        raise ConfigError(f"to must be one of {', '.join(FORMATS)}, not {to!r}")
    if agent.refresh_every:
        raise ConfigError(
            "this agent rebuilds its state from the last steps every "
            f"{agent.refresh_every} steps, which a policy of one step cannot: evaluate it with "
            "--refresh-every 0, and if it does well so, export it with --recurrent"
        )
    path = Path(path)
    if path.suffix != f".{to}":
        raise ConfigError(f"the file must end in .{to}, not {path.name!r}")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent}: make it, or write to another")
    write, load = {"onnx": (_write_onnx, load_onnx), "pt2": (_write_pt2, load_pt2)}[to]
    training = agent.model.training
    agent.model.eval()  # or the dropout of training would be in the file
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unchecked = Path(folder, path.name)
            with _quiet_exporter():
                write(StepPolicy(agent.model), json.dumps(description(agent)), unchecked)
            policy = load(unchecked)
            difference = max(_difference(agent, policy, batch) for batch in CHECK_BATCHES)
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"the {to} file acts differently from the model, by up to {difference:.1e} "
                    "of half an action's range, and was not kept: please report this with the "
                    "versions of torch and onnxruntime"
                )
            unchecked.replace(path)
    except PermissionError as error:
        raise ExportError(f"{path} cannot be written ({error}): give --output") from error
    except ModuleNotFoundError as error:
        raise ExportError(
            f"{error.name} is missing, which --to onnx needs: "
            "pip install onnx onnxscript onnxruntime, or export --to pt2"
        ) from error
    finally:
        agent.model.train(training)
    return difference


def load_onnx(path: Path | str) -> Policy:
    """Return the function of arrays that an ONNX file computes, in ONNX Runtime on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda *inputs: session.run(OUTPUTS, dict(zip(INPUTS, inputs, strict=True)))


def load_pt2(path: Path | str) -> Policy:
    """Return the function of arrays that a .pt2 file computes, in PyTorch."""
    module = torch.export.load(path).module()

    def run(*inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.inference_mode():
            return tuple(output.numpy() for output in module(*map(torch.from_numpy, inputs)))

    return run


def _write_onnx(policy: StepPolicy, told: str, path: Path) -> None:
    import onnx
    import onnxscript  # noqa: F401  torch's exporter needs it

    # Not from an ExportedProgram: decomposing one fixes the batch to the example's (torch 2.13).
    example, batch = _example(policy)
    names = {"input_names": INPUTS, "output_names": OUTPUTS}
    program = torch.onnx.export(
        policy, example, dynamic_shapes=batch, dynamo=True, verbose=False, **names
    )
    written = program.model_proto
    for node in (*written.graph.node, *(n for f in written.functions for n in f.node)):
        del node.metadata_props[:]  # stack traces, with the paths of this machine
    onnx.helper.set_model_props(written, {"minrl": told})
    onnx.save(written, path)


def _write_pt2(policy: StepPolicy, told: str, path: Path) -> None:
    example, batch = _example(policy)
    with torch.no_grad():
        program = torch.export.export(policy, example, dynamic_shapes=batch)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has the paths of this machine
    torch.export.save(program, path, extra_files={DESCRIPTION: told})


def _example(policy: StepPolicy) -> tuple[tuple[Tensor, ...], list]:
    """Return inputs to trace the step with, and that their first axis is of any length."""
    inputs = map(torch.from_numpy, _inputs(policy.model, np.random.default_rng(0), 3))
    example = (*inputs, torch.zeros(3, policy.state_size))
    return example, [{0: torch.export.Dim("batch")}] * len(example)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep from users what torch's exporter says of its own parts and of torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _inputs(model: TrajectoryModel, generator: np.random.Generator, batch: int) -> tuple:
    """Draw an observation, return, timestep and reset that the model could meet."""
    mean, std = model.observation_mean.numpy(), model.observation_std.numpy()
    drawn = generator.standard_t(3, size=(batch, len(mean)))
    return (
        (mean + std * drawn).astype(np.float32),
        (model.return_scale * generator.normal(size=batch)).astype(np.float32),
        generator.integers(0, model.config.max_timestep + 1, size=batch),
        generator.random(batch) < CHECK_RESETS,
    )


def _difference(agent: DecisionAgent, policy: Policy, batch: int) -> float:
    """Return the largest difference of actions of artefact and agent, in halves of their range."""
    generator = np.random.default_rng(batch)
    reach = agent.model.action_reach.numpy()
    checked = DecisionAgent(agent.model, target_return=agent.target_return)
    checked.reset(num_envs=batch)
    state = np.zeros((batch, StepPolicy(agent.model).state_size), np.float32)
    rewards, differences = np.zeros(batch), []
    returns, timesteps, starts = np.zeros(batch), np.zeros(batch, np.int64), np.ones(batch, bool)
    for _ in range(CHECK_STEPS):
        observations, scale, _, resets = _inputs(agent.model, generator, batch)
        checked.reset(starts)
        expected = checked.act(observations, rewards)
        spent = rewards if agent.model.config.condition == "return-to-go" else 0.0
        returns = np.where(starts, agent.target_return, returns - spent)
        timesteps = np.where(starts, 0, timesteps + 1)
        actions, state = policy(observations, returns.astype(np.float32), timesteps, starts, state)
        differences.append((np.abs(actions - expected) / reach).max())
        rewards, starts = scale / 100, resets
    return float(np.max(differences))
