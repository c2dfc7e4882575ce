"""From a Python function to an object file.

Knows numba's compiler and LLVM's linker. It must not know any kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import binding
from numba.core import types
from numba.core.compiler import Flags, compile_extra
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from ridgeline.kernels.cpu.native import target_machine

# numba's functions return a status and take places for a result and an exception; kernels raise nothing.
ENTRY = """
declare i32 @"{inner}"(ptr, ptr, i64, i64, i64, i64)

define void @{name}(i64 %a, i64 %b, i64 %c, i64 %d) {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @"{inner}"(ptr %result, ptr %exception, i64 %a, i64 %b, i64 %c, i64 %d)
  ret void
}}
"""


@global_compiler_lock
def object_code(function: Callable[..., Any], name: str) -> bytes:
    """An object file with one function: `name`, of four 64-bit integers and without a result."""
    typing, target = cpu_target.typing_context, cpu_target.target_context
    typing.refresh()
    target.refresh()
    flags: Any = Flags()
    flags.no_cpython_wrapper = True
    flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    flags.nrt = False
    compiled = compile_extra(typing, target, function, (types.int64,) * 4, types.void, flags, {})
    inner = compiled.fndesc.mangled_name
    module = binding.parse_assembly(compiled.library.get_llvm_str())
    module.link_in(binding.parse_assembly(ENTRY.format(inner=inner, name=name)))
    for part in (*module.functions, *module.global_variables):
        if not part.is_declaration and part.name != name:
            part.linkage = "internal"
    tidy = binding.create_new_module_pass_manager()
    tidy.add_global_dead_code_eliminate_pass()
    tidy.run(module, binding.create_pass_builder(target_machine(), binding.create_pipeline_tuning_options()))
    made: bytes = target_machine().emit_object(module)
    return made
