"""Which part may import which, and what importing minrl costs."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = {"agents", "data", "envs", "scripts", "minrl"}

# Parts of minrl each part may import, beside minrl.errors and minrl.cache; and what it may take
# from outside.
MAY_IMPORT = {
    "agents": {"agents", "data"},
    "data": {"data", "envs"},
    "envs": {"envs"},
    "scripts": {"scripts", "agents", "data", "envs"},
}
NOT_FROM_OUTSIDE = {
    "agents": {"gymnasium", "minari", "mujoco", "h5py", "tyro", "tensorboard", "matplotlib"},
    "data": {"torch", "tyro", "tensorboard"},
    "envs": {"torch", "minari", "h5py", "tyro", "tensorboard"},
    "scripts": set(),
}
# The embedded datasets are rolled out in environments; nothing else of data needs them.
ONLY_FILES = {("data", "envs"): {"behaviours.py"}, ("agents", "data"): {"training.py"}}


def imports_of(path):
    """Yield every imported module of a file, at whatever depth, except for type checking."""
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped.update(id(inner) for child in node.body for inner in ast.walk(child))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_parts_import_only_downwards(part):
    files = list((ROOT / part).rglob("*.py"))
    assert files
    for path in files:
        for module in imports_of(path):
            top, *rest = module.split(".")
            assert top not in PARTS - {"minrl"}, f"{path} imports bare {module}"
            if path.parent.name != "adapters":  # they import what they are for
                assert top not in NOT_FROM_OUTSIDE[part], f"{path} imports {module}"
            if top != "minrl" or not rest or rest[0] in ("errors", "cache"):
                continue
            assert rest[0] in MAY_IMPORT[part], f"{path} imports {module}"
            allowed = ONLY_FILES.get((part, rest[0]))
            assert allowed is None or path.name in allowed, f"{path} imports {module}"


def listed_packages():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["options"]["packages"].split())


def test_every_package_is_listed():
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for part in PARTS
        for path in (ROOT / part).rglob("__init__.py")
    }
    expected = {name if name == "minrl" else f"minrl.{name}" for name in found}
    assert listed_packages() == expected


def modules_after(statement):
    program = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


HEAVY = {
    "gymnasium",
    "minari",
    "mujoco",
    "h5py",
    "tensorboard",
    "matplotlib",
    "tyro",
    "safetensors",
}


def test_the_recurrent_layers_need_torch_alone():
    assert not modules_after("from minrl import MinGRU, MinLSTM") & HEAVY


def test_importing_minrl_loads_nothing():
    loaded = modules_after("import minrl, minrl.agents, minrl.data, minrl.envs, minrl.scripts")
    assert not loaded & (HEAVY | {"torch", "numpy"})


def test_every_public_name_can_be_imported_and_a_wrong_one_is_named():
    import minrl

    for name in minrl.__all__:
        assert getattr(minrl, name) is not None
    assert set(minrl.__all__) <= set(dir(minrl))
    with pytest.raises(AttributeError, match="no attribute 'MinTransformer'"):
        _ = minrl.MinTransformer
