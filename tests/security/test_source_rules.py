"""What the library's source may not contain, held by a walk over its syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ("agents", "data", "envs", "minrl", "scripts")
QUIET = ("agents", "data", "envs")  # scripts and the command line may print

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal"}
UNSAFE_MODULES |= {"shelve", "jsonpickle", "imp", "pickletools"}
UNSAFE_CALLS = {
    **dict.fromkeys(("eval", "exec", "compile", "__import__"), "runs code from text"),
    **dict.fromkeys(("os.system", "os.popen", "pty.spawn"), "runs a shell"),
    **dict.fromkeys(("subprocess.getoutput", "subprocess.getstatusoutput"), "runs a shell"),
    **dict.fromkeys(("yaml.load", "yaml.unsafe_load", "yaml.full_load"), "builds any object"),
    **dict.fromkeys(("pandas.read_pickle", "numpy.lib.format.read_array"), "unpickles"),
    **dict.fromkeys(("torch.load", "torch.save", "torch.serialization.load"), "pickles"),
    **dict.fromkeys(("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter"), "code"),
    **dict.fromkeys(("minari.load_dataset", "minari.delete_dataset"), "trusts metadata"),
    "tempfile.mktemp": "is a race",
}
# What may be used with the right arguments alone, and so not be handed on to who knows whom.
GUARDED = {"numpy.load"}
SAFE_RANDOM = {"default_rng", "Generator", "SeedSequence", "PCG64", "Philox", "BitGenerator"}


def names_of(tree):
    """Return what each imported name stands for, in full."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def full_name(node, names):
    """Return the dotted name of an expression with imports undone, "" if it has none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id).removeprefix("builtins.")
    match node:
        case ast.Attribute(value=value, attr=last):
            pass
        case ast.Call(func=ast.Name("getattr"), args=[value, ast.Constant(str(last)), *_]):
            pass
        case _:
            return ""
    start = full_name(value, names)
    return last if start == "builtins" else f"{start}.{last}"


def keyword(call, name):
    """Return the constant given for an argument by its name; None where there is none."""
    for given in call.keywords:
        if given.arg == name:
            return given.value.value if isinstance(given.value, ast.Constant) else "not constant"
    return None


def imported_by_name(call):
    """Return the module that a call of import_module imports, "" if that is not known here."""
    name = call.args[0] if call.args else None
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""


def faults_of_call(call, name, may_print):
    unseen = any(given.arg is None for given in call.keywords)  # f(**options)
    starts_process = name.startswith("subprocess.")
    pickles = name in ("numpy.load", "numpy.savez", "numpy.save") and keyword(call, "allow_pickle")
    found = {
        f"{name} with allow_pickle": pickles
        or (name == "numpy.load" and (unseen or len(call.args) > 2)),
        f"{name} with shell=True": keyword(call, "shell")
        or (starts_process and (unseen or len(call.args) > 8)),
        f"{name} with trust_remote_code": keyword(call, "trust_remote_code"),
        "imports what is not safe": name == "importlib.import_module"
        and imported_by_name(call).partition(".")[0] in UNSAFE_MODULES,
        "recover_environment builds what the metadata says": name.endswith(".recover_environment"),
        "print in library code": not may_print
        and name in ("print", "sys.stdout.write", "sys.stderr.write"),
    }
    return [fault for fault, is_there in found.items() if is_there]


def faults_of_name(name, has_random):
    """What is wrong wherever it stands: `run = os.system`, `map(eval, lines)`."""
    if name in UNSAFE_CALLS:
        yield f"{name} {UNSAFE_CALLS[name]}"
    start, _, last = name.rpartition(".")
    if start == "numpy.random" and last not in SAFE_RANDOM:
        yield f"{name}: randomness that all code shares"
    if start == "random" and has_random and last != "Random":
        yield f"{name}: randomness that all code shares"


def faults_of(source, may_print=False):
    """Return what a file has that no file may have, as lines of text."""
    tree = ast.parse(source)
    names = names_of(tree)
    has_random = any(name.partition(".")[0] == "random" for name in names.values())
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    faults = []
    for node in ast.walk(tree):
        found = []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [f"imports {m}" for m in modules if m.partition(".")[0] in UNSAFE_MODULES]
            found += ["imports *"] * ("*" in modules)
        if isinstance(node, ast.Call):
            found += faults_of_call(node, full_name(node.func, names), may_print)
        if not isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del)):
            name = full_name(node, names)
            found += faults_of_name(name, has_random)
            if name in GUARDED and id(node) not in called:
                found.append(f"{name} is handed on, with arguments that nobody sees")
        if found:
            faults += [f"line {node.lineno}: {fault}" for fault in dict.fromkeys(found)]
    return faults


@pytest.mark.parametrize("part", LIBRARY)
def test_no_file_of_the_library_breaks_a_rule(part):
    files = sorted((ROOT / part).rglob("*.py"))
    assert files
    broken = {
        path.relative_to(ROOT).as_posix(): faults
        for path in files
        if (faults := faults_of(path.read_text(), may_print=part not in QUIET))
    }
    assert broken == {}


BAD = [
    "import pickle",
    "import pickle as p",
    "from pickle import loads",
    "from _pickle import loads",
    "def f():\n    import cloudpickle",
    "import joblib.numpy_pickle",
    "import marshal, os",
    "import shelve",
    "import dill",
    "import torch\ntorch.load('a')",
    "import torch\ntorch.load('a', weights_only=True, map_location='cpu')",
    "import torch\ntorch.save({}, 'a')",
    "import torch\nread = torch.load",
    "import torch as t\nt.load('a', map_location='cpu')",
    "from torch import load\nload('a')",
    "from torch import load as read\nread('a')",
    "import torch\ntorch.jit.load('a')",
    "import numpy as np\nnp.load('a', allow_pickle=True)",
    "import numpy\nflag = 1\nnumpy.load('a', allow_pickle=flag)",
    "from numpy import load\nload('a', allow_pickle=True)",
    "eval('1')",
    "exec('1')",
    "compile('1', '', 'eval')",
    "run = eval",
    "list(map(exec, []))",
    "__import__('os')",
    "import builtins\nbuiltins.eval('1')",
    "import os\nos.system('ls')",
    "from os import system\nsystem('ls')",
    "import os\nrun = os.system",
    "import os\nos.popen('ls')",
    "import subprocess\nsubprocess.run('ls', shell=True)",
    "import subprocess as s\ns.Popen('ls', shell=1)",
    "import subprocess\nflag = True\nsubprocess.call('ls', shell=flag)",
    "import subprocess\nsubprocess.getoutput('ls')",
    "import yaml\nyaml.load('a')",
    "from yaml import load\nload('a', Loader=None)",
    "import pandas as pd\npd.read_pickle('a')",
    "import numpy as np\nnp.random.seed(0)",
    "import numpy as np\nnp.random.uniform(size=3)",
    "from numpy import random\nrandom.normal()",
    "from numpy.random import randint\nrandint(3)",
    "import numpy.random as r\nr.shuffle([])",
    "import numpy as np\nnp.random.RandomState(0)",
    "import random\nrandom.random()",
    "import random\nrandom.seed(0)",
    "import random as r\nr.random()",
    "import random as r\nshuffle = r.shuffle",
    "from random import shuffle\nshuffle([])",
    "from random import choice as pick\npick([1])",
    "from random import *",
    "from os import *",
    "import numpy as np\nnp.load('a', None, True)",
    "import numpy as np\noptions = {}\nnp.load('a', **options)",
    "import numpy as np\nread = np.load\nread('a')",
    "import torch\ntorch.serialization.load('a')",
    "from torch.serialization import load\nload('a', weights_only=False)",
    "import torch.serialization as s\ns.load('a')",
    "import torch\nread = torch.load\nread('a')",
    "import torch, functools\nfunctools.partial(torch.load, weights_only=False)",
    "import torch\noptions = {}\ntorch.load('a', **options)",
    "import torch\ngetattr(torch, 'load')('a')",
    "import os\ngetattr(os, 'system')('ls')",
    "import builtins\ngetattr(builtins, 'eval')('1')",
    "import importlib\nimportlib.import_module('pickle')",
    "import subprocess\noptions = {}\nsubprocess.run('ls', **options)",
    "import subprocess\nsubprocess.Popen('ls', -1, None, None, None, None, None, True, True)",
    "import sys\nsys.stdout.write('a')",
    "import minari\nminari.delete_dataset('a-v0')",
    "import minari\nminari.load_dataset('a-v0').recover_environment()",
    "import tempfile\ntempfile.mktemp()",
    "print('a')",
]

GOOD = [
    "from safetensors import safe_open\nsafe_open('a', framework='pt')",
    "import numpy as np\nnp.load('a', allow_pickle=False)\nnp.load('b')",
    "import numpy as np\nnp.random.default_rng(0).normal()",
    "from numpy.random import Generator, SeedSequence",
    "import subprocess\nsubprocess.run(['ls'], shell=False)",
    "import re, torch\nre.compile('a')\ntorch.compile(None)",
    "model = object()\nmodel.eval()\nmodel.exec()",
    "import json\njson.load(open('a'))",
    "import yaml\nyaml.safe_load('a')",
    "file = object()\nfile.print()",
    "import random\nrandom.Random(0).random()",
    "import random as r\nr.Random(0).shuffle([])",
    "def f(random):\n    return random.normal()",
    "import torch\ngetattr(torch, 'compile')(None)",
    "import importlib\nimportlib.import_module('mujoco')",
]


@pytest.mark.parametrize("source", BAD)
def test_the_walk_finds_what_is_forbidden(source):
    assert faults_of(source)


@pytest.mark.parametrize("source", GOOD)
def test_the_walk_lets_pass_what_only_looks_alike(source):
    assert faults_of(source) == []


def test_scripts_may_print_but_no_more():
    assert faults_of("print('a')", may_print=True) == []
    assert faults_of("print(eval('a'))", may_print=True)
