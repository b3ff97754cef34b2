"""A driver that runs what is launched: the compiled kernel's PTX, in the emulator (ptx_machine), on tensors of the CPU.

What the emulator gets is what the CUDA driver would: grid, descriptors, addresses and sizes of the launch.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import ptx_machine
import pytest
import torch
from numpy.typing import NDArray
from recorded_launches import Launched, recorded
from torch import Tensor

_parsed = lru_cache(16)(ptx_machine.parse)


class Emulator:
    """How launches run: the seed decides what the hardware leaves open, `lazy` products run as late as they may."""

    seed = 0
    lazy = True

    def __call__(self, source: Any, launched: Launched) -> None:
        """Run it."""
        compiled = _compiled(source, launched)
        program = _parsed(_fenced(compiled.asm["ptx"]))
        memory = ptx_machine.Memory()
        self.memory, self.addresses = memory, dict[int, int]()
        # a descriptor of a weight has nothing but its address, which is an argument as well
        tensors = {value.data_ptr(): value for value in launched.arguments.values() if isinstance(value, Tensor)}
        params: list[Any] = []
        for name, kind in launched.signature.items():
            value = launched.arguments[name]
            if kind.startswith("tensordesc"):
                metadata = compiled.metadata.tensordesc_meta[sum(isinstance(p, ptx_machine.TensorMap) for p in params)]
                params += self._described(value, metadata, tensors)
            elif isinstance(value, Tensor):
                params.append(self._address(value))
            elif kind != "constexpr":
                params.append(value)
        params += [0] * (len(program.params) - len(params))  # scratch memory, of which there is none
        _, cluster, shared = launched.handed[1]
        options = {"seed": self.seed, "lazy": self.lazy, "cluster": cluster}
        ptx_machine.launch(program, launched.grid, params, memory, shared, **options)

    def _described(self, value: Any, metadata: dict[str, Any], tensors: dict[int, Tensor]) -> list[Any]:
        """What Triton's launcher makes of a descriptor: a tensor map, two sizes and two strides."""
        base = value.base
        address = self._address(base if isinstance(base, Tensor) else tensors[base.data_ptr()])
        element = metadata["elem_size"]
        box = (metadata["block_size"][0], metadata["block_size"][1])
        swizzle = (0, 32, 64, 128)[metadata["swizzle"]]
        rows, columns = value.shape
        described = ptx_machine.TensorMap(address, (rows, columns), value.strides[0] * element, box, element, swizzle)
        return [described, rows, columns, *value.strides]

    def _address(self, tensor: Tensor) -> int:
        """Where the emulator has a tensor, whose memory it shares."""
        if tensor.data_ptr() not in self.addresses:
            self.addresses[tensor.data_ptr()] = self.memory.add(_bytes(tensor))
        return self.addresses[tensor.data_ptr()]


def _fenced(ptx: str) -> str:
    """With the fence between copies of Ampere's kind and products, which PTX asks for and Triton 3.6 leaves out."""
    fence, product = "fence.proxy.async.shared::cta;", "wgmma.fence.sync.aligned;"
    return ptx if fence in ptx else ptx.replace(product, f"{fence}\n{product}")


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.view(torch.uint8).numpy().reshape(-1)


def _compiled(source: Any, launched: Launched) -> Any:
    """The compiled kernel of a launch, whose function handle is the recording driver's."""
    for cache in source.fn.device_caches.values():
        for kernel in cache[0].values():
            if kernel.packed_metadata is launched.handed[1]:
                return kernel
    raise LookupError(f"no compiled {launched.kernel} has been launched so")


def emulated(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Emulator]:
    """Every launch runs. All go through Triton's own code, which is given tensors and not addresses.

    Fresh memory holds NaN.
    """
    from ptq_kernels.triton import enqueue

    emulator = Emulator()
    monkeypatch.setattr(enqueue, "hooked", lambda: True)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in recorded(monkeypatch, folder, emulator):
            yield emulator
    finally:
        torch.use_deterministic_algorithms(False)
