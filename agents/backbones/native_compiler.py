"""Compiles a kernel module to object code on standard output; see ``native.py``, which runs it.

``python -m minrl.agents.backbones.native_compiler MARK SOURCES MODULE [VARIANT ...]``; MARK comes
first, and SOURCES is the digest of the files that the caller runs.
"""

import importlib
import json
import os
import sys

if __name__ == "__main__":  # what others print from here on must not end up in the object code
    OUTPUT = os.dup(1)
    os.dup2(2, 1)

os.environ["NUMBA_OPT"] = "0"  # read on import: everything is optimised once, as a whole, below

import numba
from llvmlite import binding
from numba import types

from minrl.agents.backbones.native_sources import digest_of_sources

NUMBA_TYPES = {
    "f": types.CPointer(types.float32),
    "b": types.CPointer(types.uint8),
    "i": types.int64,
}


def compile_module(module: str, *variant: str) -> bytes:
    """Return a JSON line with the symbol and argument types of each kernel, then object code.

    Raises:
        RuntimeError: If the code needs anything from outside, which nobody would provide.
    """
    header, code = {}, binding.parse_assembly("")
    for name, (function, arguments) in importlib.import_module(module).kernels(*variant).items():
        signature = types.void(*(NUMBA_TYPES[letter] for letter in arguments))
        # Python's check for division by zero would keep loops from being vectorised.
        compiled = numba.cfunc(signature, error_model="numpy", fastmath={"contract"})(function)
        header[name] = (compiled.native_name, arguments)
        code.link_in(binding.parse_assembly(compiled.inspect_llvm()))
    target = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="small",
    )
    _optimise(code, target, keep={symbol for symbol, _ in header.values()})
    outside = [f.name for f in code.functions if f.is_declaration and f.name[:5] != "llvm."]
    if outside:
        raise RuntimeError(f"{module} needs {outside}")
    return json.dumps(header).encode() + b"\n" + target.emit_object(code)


def _optimise(code: binding.ModuleRef, target: binding.TargetMachine, keep: set[str]) -> None:
    """Optimise in place; what is not in ``keep`` may be taken apart, Numba's error paths too."""
    for function in code.functions:
        if not function.is_declaration and function.name not in keep:
            function.linkage = "internal"
    # Two vectors at a time: one chain of dependent instructions does not fill the pipelines.
    binding.set_option("", "-force-vector-interleave=2")
    options = binding.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.loop_interleaving = True
    builder = binding.create_pass_builder(target, options)
    builder.getModulePassManager().run(code, builder)


if __name__ == "__main__":
    _, mark, sources, *wanted = sys.argv
    if digest_of_sources() != sources:
        raise RuntimeError("the sources of the kernels are not those that this process runs")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    with os.fdopen(OUTPUT, "wb") as output:
        output.write(mark.encode() + compile_module(*wanted))
