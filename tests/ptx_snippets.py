"""Kernels of a few lines of PTX, and what runs them on the emulated machine."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import ptx_machine
from numpy.typing import NDArray

REGISTERS = (
    """.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .b32 %d<16>; .reg .b32 %a<8>; .reg .b64 %w<20>;"""
)
WAIT = """
{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared.b64 complete, [BARRIER], PARITY;
	@!complete bra.uni waitLoop;
}
"""
COPY = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"


def wait(barrier: str, parity: int = 0) -> str:
    """Return a wait at a barrier, as Triton writes it."""
    return WAIT.replace("BARRIER", barrier).replace("PARITY", str(parity))


def kernel(body: str, params: Sequence[str] = (), threads: int = 32) -> str:
    """Return a module with one kernel; parameters are "u32", "u64" or "map"."""
    kinds = {
        "map": ".align 64 .b8 k_param_{}[128]",
        "u64": ".u64 .ptr .global .align 1 k_param_{}",
        "u32": ".u32 k_param_{}",
    }
    listed = ",\n".join(".param " + kinds[kind].format(i) for i, kind in enumerate(params))
    return (
        f".version 8.7\n.target sm_90a\n.extern .shared .align 16 .b8 global_smem[];\n"
        f".visible .entry k(\n{listed}\n)\n.reqntid {threads}\n{{\n{REGISTERS}\n{body}\nret;\n}}\n"
    )


def run(
    body: str,
    params: Sequence[Any],
    threads: int = 32,
    shared: int = 8192,
    grid: tuple[int, ...] = (1,),
    **options: Any,
) -> None:
    """Run a snippet; arrays become buffers, and so does the array in a tuple (array, box, swizzle), of a tensor map."""
    memory = ptx_machine.Memory()
    kinds, given = [], []
    for param in params:
        if isinstance(param, tuple):
            array, box, swizzle = param
            kinds.append("map")
            given.append(
                ptx_machine.TensorMap(memory.add(array), array.shape, array.strides[0], box, array.itemsize, swizzle)
            )
        else:
            kinds.append("u32" if isinstance(param, int) else "u64")
            given.append(param if isinstance(param, int) else memory.add(param))
    program = ptx_machine.parse(kernel(body, kinds, threads))
    ptx_machine.launch(program, grid, given, memory, shared, **options)


def evaluate(text: str, inputs: Sequence[NDArray[Any]], result: Any) -> NDArray[Any]:
    """Run instructions on 32 lanes, from registers %x0, %x1, ... into %y."""
    out = np.zeros(32, result)
    lines = ["mov.u32 %r0, %tid.x;", f".reg .b{8 * out.itemsize} %y;"]
    for i, array in enumerate([*inputs, out]):
        size = array.itemsize
        lines += [f"ld.param.b64 %w{i}, [k_param_{i}];", f"mad.wide.u32 %w{i}, %r0, {size}, %w{i};"]
        if i < len(inputs):
            lines += [f".reg .b{8 * size} %x{i};", f"ld.global.b{8 * size} %x{i}, [%w{i}];"]
    lines += [text, f"st.global.b{8 * out.itemsize} [%w{len(inputs)} + 0], {{ %y }};"]
    run("\n".join(lines), [*inputs, out])
    return out
