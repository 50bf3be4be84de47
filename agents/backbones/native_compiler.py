"""Compiles a kernel module to object code on standard output; see ``native.py``, which runs it.

``python -m minrl.agents.backbones.native_compiler MODULE [VARIANT ...]``
"""

import importlib
import json
import sys

import numba
from llvmlite import binding
from numba import types

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
    # Two vectors at a time: one chain of dependent instructions does not fill the pipelines.
    binding.set_option("", "-force-vector-interleave=2")
    header, linked = {}, None
    for name, (function, arguments) in importlib.import_module(module).kernels(*variant).items():
        signature = types.void(*(NUMBA_TYPES[letter] for letter in arguments))
        # Python's check for division by zero would keep loops from being vectorised.
        options = {"error_model": "numpy", "fastmath": {"contract"}, "forceinline": True}
        compiled = numba.cfunc(signature, **options)(function)
        header[name] = (compiled.native_name, arguments)
        code = binding.parse_assembly(compiled.inspect_llvm())
        outside = [f.name for f in code.functions if f.is_declaration and f.name[:5] != "llvm."]
        if outside:
            raise RuntimeError(f"{module}.{name} needs {outside}")
        if linked is None:
            linked = code
        else:
            linked.link_in(code)
    target = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=3,
        reloc="pic",
        codemodel="small",
    )
    return json.dumps(header).encode() + b"\n" + target.emit_object(linked)


if __name__ == "__main__":
    sys.stdout.buffer.write(compile_module(*sys.argv[1:]))
