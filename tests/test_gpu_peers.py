"""The folder of other 4-bit kernels, made from packages that stand in for the real ones; the real ones where there are.

Oracle: the folder that the benchmark's drivers expect; float64 products of the dense weight.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "gpu_peers"
FILES = {
    "gemlite-0.6.0.post2": ["gemlite/__init__.py"],
    "conch_triton_kernels-1.3": ["conch/__init__.py"],
    "humming_kernels-0.1.19": ["humming/__init__.py", "humming/include/humming/all.cuh"],
    "nvidia_cuda_cccl-13.0.85": [
        f"nvidia/cu13/include/cccl/{name}" for name in ("cuda/std/cstdint", "nv/target", "cub/cub.cuh")
    ],
    "tabulate-0.9.0": ["tabulate.py"],
    "tqdm-4.67.1": ["tqdm/__init__.py"],
}
NVCC = '#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho "$3" >"$2"\n'


def run(*command: object, code: int = 0, **environment: object) -> str:
    """A command that must end with `code`; what it printed."""
    given = {**os.environ, "PIP_NO_INDEX": "1", **{name: str(value) for name, value in environment.items()}}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=given, check=False)
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout + done.stderr


def wheels(folder: Path, extra: bytes = b"") -> Path:
    """A package index of wheels that hold the files that matter, and in one of them `extra`."""
    folder.mkdir()
    for package, files in FILES.items():
        name, version = package.split("-")
        with zipfile.ZipFile(folder / f"{package}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            for path in files:
                wheel.writestr(path, extra if path == "gemlite/__init__.py" else "")
            wheel.writestr(
                f"{package}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            )
            wheel.writestr(
                f"{package}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{package}.dist-info/RECORD", "")
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the script takes of Marlin."""
    (tmp_path / "marlin-git" / "marlin").mkdir(parents=True)
    for name in ("__init__.py", "marlin_cuda_kernel.cu"):
        (tmp_path / "marlin-git" / "marlin" / name).write_text("")
    return tmp_path / "marlin-git"


def test_the_folder_has_what_the_drivers_expect_and_can_be_made_again(tmp_path: Path, checkout: Path) -> None:
    index, place, tools = wheels(tmp_path / "index"), tmp_path / "peers", tmp_path / "tools"
    tools.mkdir()
    (tools / "nvcc").write_text(NVCC)
    (tools / "nvcc").chmod(0o755)
    for _ in range(2):
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        said = run(sys.executable, SCRIPT, place, "--marlin", checkout, PIP_FIND_LINKS=index, PATH=path)
        assert f"{place}: 0.0 MiB, gemlite 0.6.0.post2" in said
        found = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
        kept = {name for name in found if ".dist-info" not in name}
        assert kept == {
            *(name for files in FILES.values() for name in files if not name.startswith("nvidia")),
            "humming/include/cuda/std/cstdint",
            "humming/include/nv/target",
            "marlin/__init__.py",
            "marlin/libmarlin.so",
            "gpu_peers.json",
        }
        assert "marlin_cuda_kernel.cu" in (place / "marlin" / "libmarlin.so").read_text()
        assert json.loads((place / "gpu_peers.json").read_text())["marlin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index", "marlin-git", "peers", "tools"]


def test_what_the_script_refuses(tmp_path: Path, checkout: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("")
    assert f"new, empty or of its own making, {other} has no gpu_peers.json" in run(
        sys.executable, SCRIPT, other, code=1
    )
    assert (other / "precious").exists()
    place = tmp_path / "peers"
    assert f"needs pip, {sys.executable} has none" in run(sys.executable, "-S", SCRIPT, place, code=1)
    said = run(sys.executable, SCRIPT, place, "--marlin", other, code=1)
    assert f"with marlin/__init__.py and marlin/marlin_cuda_kernel.cu, {other} has not" in said
    said = run(sys.executable, SCRIPT, place, "--marlin", checkout, code=1, PATH=tmp_path, CUDA_HOME=tmp_path)
    assert "needs CUDA's compiler as nvcc, found none in PATH and CUDA_HOME" in said
    assert "needs gemlite==0.6.0.post2 from a package index, but" in run(sys.executable, SCRIPT, place, code=1)
    index = wheels(tmp_path / "index", bytes(65 * 2**20))
    said = run(sys.executable, SCRIPT, place, code=1, PIP_FIND_LINKS=index)
    assert "makes folders of up to 64 MiB, this one would be of 65 MiB" in said
    assert not place.exists()


DRIVERS = """
import copy, sys, torch, triton
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, interpreter

facts = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.get_device_properties = lambda *_: facts
driver.set_active(SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0, get_current_stream=lambda _: 0,
    utils=SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448}),
    get_benchmarker=lambda: lambda call, **_: (call(), [1.0] * 3)[1],
))
convert = interpreter._implicit_cvt  # takes no bool
interpreter._implicit_cvt = lambda value: convert(int(value) if isinstance(value, bool) else value)
import gpu_peers
sys.path.append(sys.argv[1])
torch.manual_seed(0)
n, k = 256, 2048
scales = ((torch.rand(n, k // 128) + 0.5) / k**0.5).bfloat16()
weight = gpu_peers.Weight(torch.randint(0, 16, (n, k), dtype=torch.uint8), scales)
dense = weight.dense().double()
for name, rows in (("gemlite", (1, 16)), ("conch", (1, 16, 65))):
    # the interpreter has no constants of bfloat16, in which Conch subtracts 8
    given = weight if name == "gemlite" else weight._replace(scales=weight.scales.half())
    product = gpu_peers.PEERS[name](given)
    product = copy.deepcopy(product) if isinstance(product, torch.nn.Module) else product
    for m in rows:
        x = torch.randn(m, k).half()
        want = x.double() @ dense.T
        error = float((product(x).double() - want).norm() / want.norm())
        assert error < 5e-3, (name, m, error)
        print(name, m, error)
"""


@pytest.mark.slow
@pytest.mark.skipif("PTQ_PEERS" not in os.environ, reason="PTQ_PEERS must name a folder that scripts/gpu_peers made")
def test_the_real_kernels_of_triton_agree_with_float64() -> None:
    pytest.importorskip("triton")
    paths = os.pathsep.join([str(ROOT / "kernels" / "bench"), str(ROOT / "kernels")])
    peers = Path(os.environ["PTQ_PEERS"]).resolve()
    said = run(sys.executable, "-c", DRIVERS, peers, TRITON_INTERPRET=1, PYTHONPATH=paths, PYTHONDONTWRITEBYTECODE=1)
    assert len([line for line in said.splitlines() if line.startswith(("gemlite ", "conch "))]) == 5
