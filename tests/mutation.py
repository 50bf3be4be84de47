"""Mutation testing: does some test fail for every small change of the code?

    python tests/mutation.py [MODULE[:FIRST_LINE] ...]

Each mutant is one change of one module: an operator swapped, a condition negated, a number off by
one, a call, a raise or a keyword argument left out. The module's tests run on it in a copy of the
checkout until one fails, in a child forked from this process, which has imported torch already.
What survives is printed as a difference: either a test is missing, or the change makes none.
Needs Linux or macOS, and minutes a module.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from difflib import unified_diff
from pathlib import Path

import pytest
import torch

CELLS = [
    f"tests/agents/backbones/test_{name}.py"
    for name in ("scan", "scan_accuracy", "scan_operator", "cells", "layer", "transforms")
]
CHECKPOINTS = [
    "tests/agents/test_checkpoint.py",
    "tests/agents/test_old_checkpoints.py",
    "tests/security/test_checkpoints.py",
]
HDF5 = [
    "tests/data/test_hdf5_filters.py",
    "tests/data/test_hdf5_guard.py",
    "tests/security/test_hdf5.py",
    "tests/data/test_minari_source.py",
]
TESTS = {
    "agents/backbones/scan.py": CELLS,
    "agents/backbones/scan_torch.py": CELLS,
    "agents/checkpoint.py": [
        *CHECKPOINTS,
        "tests/agents/test_agent_files.py",
        "tests/security/test_agent_headers.py",
        "tests/faults/test_damaged_checkpoint.py",
    ],
    "agents/files.py": ["tests/agents/test_files.py", *CHECKPOINTS],
    "agents/trainer_state.py": [
        "tests/agents/test_trainer_state.py",
        *CHECKPOINTS,
        "tests/agents/test_training.py",
    ],
    "data/hdf5_filters.py": HDF5,
    "data/hdf5_guard.py": HDF5,
    "data/validate.py": [
        "tests/data/test_validate.py",
        "tests/data/test_episodes.py",
        "tests/data/test_minari_source.py",
    ],
}
"""The modules whose mistakes nobody would notice, and the tests that are to notice them."""

SWAPPED = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.Mult],
    ast.Pow: [ast.Mult],
    ast.BitAnd: [ast.BitOr],
    ast.LShift: [ast.RShift],
    ast.RShift: [ast.LShift],
    ast.MatMult: [ast.Add],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}


def main(modules: list[str]) -> None:
    root = Path(__file__).resolve().parents[1]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkout = copy_checkout(root, Path(folder) / "checkout")
        os.environ["MINRL_CACHE"] = f"{folder}/cache"
        os.environ["PYTHONPATH"] = str(checkout)
        sys.path.insert(0, str(checkout))  # before the installed package
        sys.dont_write_bytecode = True
        os.chdir(checkout)
        for name in modules or TESTS:
            module, _, first_line = name.partition(":")
            print_survivors(checkout, module, int(first_line or 1))


def copy_checkout(root: Path, checkout: Path) -> Path:
    """Copy what Git tracks, laid out so that ``minrl`` imports from the copy."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
    for name in tracked.stdout.decode().split("\0"):
        if name and (root / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, checkout / name)
    for package in ("agents", "data", "envs", "scripts"):
        (checkout / "minrl" / package).symlink_to(checkout / package)
    return checkout


def print_survivors(checkout: Path, module: str, first_line: int) -> None:
    """Run the tests on each mutant of a module; end the program if they fail without one."""
    path, tests = checkout / module, TESTS[module]
    tree = ast.parse(path.read_text())
    plain = ast.unparse(tree)
    path.write_text(plain)
    passed, baseline = run_tests(tests, limit=600)
    if not passed:
        sys.exit(f"{module}: its tests fail without a mutant")
    killed = survived = 0
    for line, mutant in sorted(mutants_of(tree)):
        if mutant == plain or line < first_line:
            continue
        path.write_text(mutant)
        if run_tests(tests, limit=5 * baseline + 30)[0]:
            survived += 1
            changed = unified_diff(plain.splitlines(), mutant.splitlines(), n=0, lineterm="")
            print(f"{module}, line {line}", *list(changed)[3:], sep="\n    ", flush=True)
        else:
            killed += 1
    path.write_text(plain)
    print(f"{module}: {killed} of {killed + survived} mutants caught", flush=True)


def run_tests(tests: list[str], limit: float) -> tuple[bool, float]:
    """Return whether the tests pass in less than so many seconds, and the seconds."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        code = 1
        try:
            code = int(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *tests]))
        finally:
            os._exit(code)
    ended, status = 0, 1
    while not ended and time.monotonic() < start + limit:
        time.sleep(0.02)
        ended, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # also what the tests have started
    if not ended:
        os.waitpid(child, 0)
    return bool(ended) and status == 0, time.monotonic() - start


def mutants_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the source of each mutant."""
    untouched = {id(part) for node in ast.walk(tree) for part in texts_and_types(node)}
    places = [
        (parent, field, position)
        for parent in ast.walk(tree)
        for field, value in ast.iter_fields(parent)
        for position in (range(len(value)) if isinstance(value, list) else [None])
    ]
    for parent, field, position in places:
        value = getattr(parent, field)
        node = value if position is None else value[position]
        if not isinstance(node, ast.expr | ast.stmt) or id(node) in untouched:
            continue
        for changed in variants(node):
            setattr(
                parent, field, changed if position is None else replaced(value, position, changed)
            )
            yield node.lineno, ast.unparse(tree)
            setattr(parent, field, value)


def texts_and_types(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what lies in annotations and in the messages of errors."""
    kept = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        kept += node.exc.args
    for part in filter(None, kept):
        yield from ast.walk(part)


def variants(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    """Yield what a node may be changed to."""
    yield from other_operators(node)
    yield from other_values(node)
    yield from left_out(node)


def other_operators(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    match node:
        case ast.BinOp() | ast.AugAssign() | ast.BoolOp():
            for other in SWAPPED.get(type(node.op), []):
                yield but(node, op=other())
        case ast.Compare():
            for position, operator in enumerate(node.ops):
                for other in SWAPPED[type(operator)]:
                    yield but(node, ops=replaced(node.ops, position, other()))
        case ast.UnaryOp() if not isinstance(node.operand, ast.Constant):
            yield node.operand
        case ast.If() | ast.While() | ast.IfExp():
            yield but(node, test=ast.UnaryOp(ast.Not(), node.test))


def other_values(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    match node:
        case ast.Constant(value=bool()):
            yield but(node, value=not node.value)
        case ast.Constant(value=int()):
            yield but(node, value=node.value + 1)
            yield but(node, value=max(node.value - 1, 0))
        case ast.Constant(value=float()):
            yield but(node, value=2 * node.value + 1)
        case ast.Return() if node.value is not None:
            yield but(node, value=None)
        case ast.For():
            yield but(node, iter=ast.Tuple([], ast.Load()))


def left_out(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    match node:
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.Continue() | ast.Break():
            yield ast.Pass()
        case ast.With() if all(item.optional_vars is None for item in node.items):
            yield ast.If(ast.Constant(True), node.body, [])
        case ast.BoolOp():
            for position in range(len(node.values)):
                yield but(node, values=replaced(node.values, position))
        case ast.Call():
            for position, keyword in enumerate(node.keywords):
                if keyword.arg not in (None, "device", "dtype"):
                    yield but(node, keywords=replaced(node.keywords, position))


def but(node: ast.AST, **fields: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def replaced(values: list, position: int, *others: object) -> list:
    return [*values[:position], *others, *values[position + 1 :]]


if __name__ == "__main__":
    main(sys.argv[1:])
