"""Everything of a GPU but the GPU: Triton compiles for compute capability 9.0, and a driver records its launches.

What is recorded is what the CUDA driver would be given: the compiled kernel, its grid, stream and arguments.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch


class Launched(NamedTuple):
    """One launch."""

    kernel: str
    signature: dict[str, str]  # types of the compiled kernel, by parameter; "constexpr" for what is compiled in
    grid: tuple[int, int, int]
    stream: int
    handed: tuple[Any, ...]  # to Triton's launcher besides: function, metadata, metadata of the launch, two hooks
    arguments: dict[str, Any]  # by parameter
    dependent: bool  # may begin while the kernel before it ends

    @property
    def values(self) -> dict[str, Any]:
        """The arguments that are no pointers."""
        return {name: value for name, value in self.arguments.items() if not name.endswith("_ptr")}

    @property
    def addresses(self) -> dict[str, int]:
        """Where the pointers point, given as such or as tensors."""
        pointers = {name: value for name, value in self.arguments.items() if name.endswith("_ptr")}
        return {name: v.data_ptr() if isinstance(v, torch.Tensor) else v for name, v in pointers.items()}


def recorded(
    monkeypatch: pytest.MonkeyPatch, folder: Path, then: Callable[[Any, Launched], None] | None = None
) -> Iterator[list[Launched]]:
    """Every launch, in order; `folder` is for what Triton compiles. `then` is called with Triton's source of each."""
    from ptq_kernels.triton import dequant, launch, pipelined, slim, tiled, wide, workspace
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    found: list[Launched] = []

    class Utils:
        def load_binary(self, *_: object) -> tuple[int, ...]:
            return 1, 2, 0, 0, 1024  # module, function, registers, spills, threads

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 227 * 1024}

        def unload_module(self, module: int) -> None:
            pass

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            self.source, self.metadata = source, metadata

        def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            arguments = dict(zip(self.source.fn.arg_names, rest[5:], strict=True))
            found.append(
                Launched(
                    self.source.fn.__name__,
                    self.source.signature,
                    (x, y, z),
                    stream,
                    rest[:5],
                    arguments,
                    self.metadata.launch_pdl,
                )
            )
            if then:
                then(self.source, found[-1])

    class Recording(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utils(), Launcher

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return device

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return 9, 0

    monkeypatch.setattr(CUDABackend, "make_cubin", lambda *_: b"")  # machine code, which no driver here loads
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")  # nor where each line comes from
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setattr(workspace, "_of_stream", {})
    monkeypatch.setattr(workspace, "_spare", {})
    of_tiles = (tiled.tiled_kernel, wide.wide_kernel, pipelined.pipelined_kernel, slim.slim_kernel)
    kernels = (*of_tiles, dequant.dequantize_kernel, dequant.words_kernel)
    for kernel in kernels:
        kernel.device_caches.clear()
    launch.forget()
    monkeypatch.setattr(driver, "_active", Recording())
    yield found
    for kernel in kernels:
        kernel.device_caches.clear()
    launch.forget()
