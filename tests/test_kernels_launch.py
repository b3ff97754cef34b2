"""The launch path with everything of a GPU but the GPU: Triton compiles for compute capability 9.0, a driver records.

What is recorded is what the CUDA driver would be given: the compiled kernel, its grid, stream and arguments.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tile_cases
import torch
from packed_weights import random_case, random_rows
from ptq_kernels.layouts import PackedWeight

triton = pytest.importorskip("triton", reason="the kernels are written in Triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compilation needs Triton without its interpreter"
)


class Launched(NamedTuple):
    """One launch."""

    signature: dict[str, str]  # types of the compiled kernel, by parameter; "constexpr" for what is compiled in
    grid: tuple[int, int, int]
    stream: int
    arguments: dict[str, Any]  # by parameter


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Every launch, in order."""
    from ptq_kernels.triton import launch, tiled, workspace
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
        def __init__(self, source: Any, metadata: object) -> None:
            self.source = source

        def __call__(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            names = self.source.fn.arg_names
            found.append(Launched(self.source.signature, (x, y, z), stream, dict(zip(names, rest[5:], strict=True))))

    class Recording(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utils(), Launcher

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return 9, 0

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(workspace, "_of_stream", {})
    monkeypatch.setattr(workspace, "_spare", {})
    tiled.tiled_kernel.device_caches.clear()
    launch.forget()
    monkeypatch.setattr(driver, "_active", Recording())
    yield found
    tiled.tiled_kernel.device_caches.clear()
    launch.forget()


def run(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None, stream: int = 0) -> torch.Tensor:
    from ptq_kernels.triton import launch

    return launch._matmul(x, weight, bias, stream)


def test_the_short_way_hands_over_what_triton_would(launches: list[Launched]) -> None:
    """Oracle: the first launch, which is Triton's own; the second goes past it. No column of y is left out."""
    from ptq_kernels.triton import workspace

    weight = tile_cases.tiled(random_case(130, 4096, 128, symmetric=False, dtype=torch.bfloat16), "tile_sm90")
    x = random_rows(5, 4096, torch.bfloat16)
    results = [run(x, weight), run(x, weight, stream=7)]
    first, second = launches
    assert first.signature == second.signature
    assert (first.stream, second.stream) == (0, 7)
    assert first.grid == second.grid
    assert first.grid[0] * first.arguments["BN"] >= 130
    for launched, y, stream in zip(launches, results, (0, 7), strict=True):
        parts, counters = workspace.get(x.device, stream)
        tensors = {"x_ptr": x, "w_ptr": weight.qweight, "y_ptr": y, "parts_ptr": parts, "counters_ptr": counters}
        assert {name: launched.arguments[name].data_ptr() for name in tensors} == {
            name: tensor.data_ptr() for name, tensor in tensors.items()
        }
    values = [{n: v for n, v in each.arguments.items() if not isinstance(v, torch.Tensor)} for each in launches]
    assert values[0] == values[1]
    assert (values[0]["M"], values[0]["N"], values[0]["K"]) == (5, 130, 4096)
    assert first.signature["M"] == "i32"  # a new number of rows compiles nothing


def test_every_number_of_rows_of_a_bucket_runs_one_compiled_kernel(launches: list[Launched]) -> None:
    from ptq_kernels.triton import tiled

    weight = tile_cases.tiled(random_case(64, 256, 128, dtype=torch.bfloat16), "tile_sm90")
    for rows in (1, 2, 16):
        run(random_rows(rows, 256, torch.bfloat16), weight)
    memory = torch.zeros(256 + 8, dtype=torch.bfloat16)
    misaligned = memory[1 : 1 + 256].view(1, 256)
    run(misaligned, weight)
    assert launches[-1].arguments["x_ptr"].data_ptr() % 16 == 0  # a copy: the kernel takes alignment for granted
    assert len(launches) == 4
    (cache,) = tiled.tiled_kernel.device_caches.values()
    assert len(cache[0]) == 1


def test_a_bias_of_another_dtype_is_another_kernel(launches: list[Launched]) -> None:
    """The compiled kernel reads the bias in one dtype; layers of one shape may differ in it."""
    weight = tile_cases.tiled(random_case(64, 256, 128, dtype=torch.bfloat16), "tile_sm90")
    x = random_rows(1, 256, torch.bfloat16)
    for _ in range(2):
        for dtype in (torch.bfloat16, torch.float32):
            run(x, weight, torch.ones(64, dtype=dtype))
    assert [each.signature["b_ptr"] for each in launches] == ["*bf16", "*fp32"] * 2


@pytest.mark.parametrize("k", [1, 32])
def test_sizes_of_one_compile(launches: list[Launched], k: int) -> None:
    """Triton compiles an argument that is 1 in, as a constant, which is another type inside the kernel."""
    from ptq_kernels.triton import launch

    weight = tile_cases.tiled(random_case(1, k, k, symmetric=False), "tile_sm90")
    x = random_rows(1, k, torch.bfloat16)
    run(x, weight)
    assert [name for name in "NK" if launches[0].signature[name] == "constexpr"] == (["N", "K"] if k == 1 else ["N"])
    assert len(list(launch._layer(x, weight, None).chunks(weight.qweight, x.dtype))) == 1
    run(x, PackedWeight(*random_case(1, k, k, bits=3).tensors, 3, k, k))
    assert len(launches) == 3


def test_what_is_not_compiled_is_refused_during_a_capture(
    launches: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptq_kernels.triton import workspace

    weight = tile_cases.tiled(random_case(64, 256, 128, dtype=torch.bfloat16), "tile_sm90")
    run(random_rows(1, 256, torch.bfloat16), weight)
    monkeypatch.setattr(workspace, "capturing", lambda device: True)
    run(random_rows(1, 256, torch.bfloat16), weight, stream=3)
    with pytest.raises(RuntimeError, match="kernel for 40 rows of a 64 x 256 weight must be compiled before a CUDA"):
        run(random_rows(40, 256, torch.bfloat16), weight)
    assert len(launches) == 2
