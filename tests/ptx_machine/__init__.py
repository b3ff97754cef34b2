"""An emulator, in numpy, of the PTX that Triton generates for pipelined kernels on Hopper.

It checks such a kernel on a machine without a GPU, the asynchronous part included: products and copies happen at any
moment the hardware may choose, and what depends on a moment raises `HazardError`.
"""

from ptx_machine.errors import (
    AccessError,
    DeadlockError,
    DivergenceError,
    HazardError,
    MachineError,
    UndefinedError,
)
from ptx_machine.launching import launch
from ptx_machine.memory import Memory, TensorMap
from ptx_machine.parser import Program, parse

__all__ = [
    "AccessError",
    "DeadlockError",
    "DivergenceError",
    "HazardError",
    "MachineError",
    "Memory",
    "Program",
    "TensorMap",
    "UndefinedError",
    "launch",
    "parse",
]
