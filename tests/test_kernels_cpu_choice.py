"""Which C++ library of ptq_kernels.cpu serves, what is said where none can, how they are built and timed."""

import ctypes
import json
import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import ptq_kernels
import pytest
import torch
from cpu_libraries import current_libraries
from packed_weights import UNIT, Case, random_case, random_rows, worst_error
from ptq_kernels import bench_cpu, build, layouts
from ptq_kernels.cpu import library, strips
from ptq_kernels.layouts import PackedWeight

LEAST = "neon" if build.on_arm() else "avx2"


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory):
    yield from current_libraries(tmp_path_factory)


def packed(case: Case) -> PackedWeight:
    return PackedWeight(*case.tensors, case.bits, case.group_size, case.codes.shape[1])


THREADS = """
import os, torch, ptq_kernels
from ptq_kernels.cpu import library
from pathlib import Path
from packed_weights import random_case, random_rows
library._DIRECTORY = Path({directory!r})
def runtimes():
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {{line.split()[-1] for line in lines if any(n in line for n in ("gomp", "iomp", "libomp"))}}
case = random_case(1024, 1024, 128, symmetric=False)
prepared = ptq_kernels.prepare(*case.tensors, impl="cpu-{isa}", **case.sized)
rows = [random_rows(m, 1024, torch.bfloat16) for m in (1, 9, 200)]
def products():
    return [ptq_kernels.matmul(x, prepared.qweight, *case.tensors[1:], layout="strips", impl=prepared.impl,
                               **case.scheme) for x in rows]
torch.ones(1 << 20).add(1)
threads = lambda: len(os.listdir("/proc/self/task"))
openmp, before = runtimes(), threads()
torch.set_num_threads(1)
one = products()
assert threads() == before, (threads(), before)
torch.set_num_threads(3)
three = products()
assert threads() == before + 2, (threads(), before)
assert runtimes() == openmp, (runtimes(), openmp)
assert all(torch.equal(a, b) for a, b in zip(one, three))
"""


@pytest.mark.parametrize("isa", library.SETS)
def test_threads_are_those_of_torch(isa: str, libraries: Path) -> None:
    if reason := library.refuse(isa):
        pytest.skip(reason)
    code = THREADS.format(directory=str(libraries), isa=isa)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr


def test_the_best_set_serves_and_is_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    best = next(name for name in library.preferred() if library.refuse(name) is None)
    library.forget()
    monkeypatch.setattr(ptq_kernels.dispatch, "_chosen", {})
    case, x = random_case(48, 64, 32), random_rows(3, 64, torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="ptq_kernels"):
        for _ in range(2):
            prepared = ptq_kernels.prepare(*case.tensors, **case.sized)
            ptq_kernels.matmul(x, prepared.qweight, *case.tensors[1:], layout=prepared.layout, **case.scheme)
    assert caplog.text.count(f"products on the CPU use the C++ library for {best}") == 1
    assert ptq_kernels.chosen() == {"cpu on cpu, 4 bits, layout strips": f"C++ library for {best}"}


@pytest.mark.parametrize("with_library", [True, False])
@pytest.mark.parametrize(("bits", "shape", "group_size"), [(4, (48, 64), 32), (3, (48, 64), 64), (4, (40, 24), 8)])
def test_what_would_run_is_what_runs(
    bits: int, shape: tuple[int, int], group_size: int, with_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a weight of that shape, prepared and multiplied."""
    monkeypatch.setattr(ptq_kernels.dispatch, "_chosen", {})
    if not with_library:
        monkeypatch.setattr(library, "best", lambda: None)
    case = random_case(*shape, group_size, bits=bits)
    foreseen = ptq_kernels.foreseen(
        *shape, bits=bits, group_size=group_size, symmetric=case.zeros is None, device=torch.device("cpu")
    )
    assert ptq_kernels.chosen() == {}
    prepared = ptq_kernels.prepare(*case.tensors, **case.sized)
    x = random_rows(3, shape[1], torch.bfloat16)
    ptq_kernels.matmul(x, prepared.qweight, *case.tensors[1:], layout=prepared.layout, **case.scheme)
    assert ptq_kernels.chosen() == dict([foreseen])


def test_what_ran_for_a_while_is_recorded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ran before, and does not run again, is no part of it, and is not forgotten."""
    monkeypatch.setattr(ptq_kernels.dispatch, "_chosen", {})

    def run(bits: int) -> str:
        case = random_case(48, 64, 32, bits=bits)
        x = random_rows(3, 64, torch.bfloat16)
        ptq_kernels.matmul(x, *case.tensors, **case.scheme)
        return f"cpu on cpu, {bits} bits, layout canonical"

    early, both = run(3), run(4)
    with ptq_kernels.recorded() as found:
        run(4)
        late = run(8)
    assert set(found) == {both, late}
    assert set(ptq_kernels.chosen()) == {early, both, late}


def test_a_processor_takes_what_it_can_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = f"processor : 0\nvendor_id : AuthenticAMD\nflags : {' '.join(library.SETS['avx512bf16'])}\n"
    monkeypatch.setattr(library, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    library.forget()
    assert "lacks" in library.refuse("avx2")  # no such file: no such processor
    (tmp_path / "cpuinfo").write_text(text)
    library.forget()
    assert library.preferred()[:2] == ("amx", "avx512bf16")
    assert library.refuse("amx") == "this processor lacks amx_bf16, amx_int8, amx_tile"
    monkeypatch.undo()
    library.forget()


def another_library(path: Path, source: str) -> None:
    path.with_suffix(".cpp").write_text(source)
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-shared", "-fPIC", path.with_suffix(".cpp"), "-o", path], check=True)


STUB = """extern "C" { int qmm_version() { return %d; } int qmm_start() { return %d; }
void qmm_set_parallel_for(void*) {} void qmm_set_torch(void*) {} void qmm_boxed() {} void qmm_pack() {}
void qmm_unpack() {} int qmm_matmul() { return 0; } void qmm_solve_columns() {} void qmm_descend_columns() {}
void qmm_grid_losses() {} void qmm_grid_moments() {} }"""
BROKEN = {
    "missing": (None, rf"_qmm_{LEAST}.so was not built; build it with `python -m ptq_kernels.build`"),
    "foreign": ("", rf"_qmm_{LEAST}.so cannot be loaded \(.*file too short\); rebuild it"),
    "another": ("int f() { return 0; }", rf"_qmm_{LEAST}.so cannot be loaded \(.*qmm_version\); rebuild it"),
    "old": (
        'extern "C" int qmm_version() { return 0; }',
        rf"_qmm_{LEAST}.so cannot be loaded \(it has version 0, {library.VERSION} is required\); rebuild it with",
    ),
    "no permission": (STUB % (library.VERSION, 1), "does not grant this process the AMX tile registers"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_without_a_usable_library_torch_runs_and_the_log_says_why(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, reason = BROKEN[how]
    if source is not None:
        path = tmp_path / build.file_name(LEAST)
        another_library(path, source) if source else path.write_bytes(b"")
    case, x = random_case(48, 64, 32), random_rows(3, 64, torch.bfloat16)
    strip_weight = layouts.convert(packed(case), "strips")
    monkeypatch.setattr(library, "_DIRECTORY", tmp_path)
    library.forget()
    try:
        with caplog.at_level(logging.WARNING, logger="ptq_kernels"):
            prepared = [ptq_kernels.prepare(*case.tensors, **case.sized) for _ in range(2)]
        assert caplog.text.count("use torch only, which is slower") == 1
        assert {p.layout for p in prepared} <= {"aten_int4", "canonical"}
        y = ptq_kernels.matmul(x, *case.tensors, impl="cpu", **case.scheme)
        assert worst_error(y, x, case, None, UNIT[torch.bfloat16]) <= 1
        with pytest.raises(RuntimeError, match=f"impl='cpu-{LEAST}' cannot run here: .*{reason}"):
            ptq_kernels.matmul(x, *case.tensors, impl=f"cpu-{LEAST}", **case.scheme)
        with pytest.raises(ValueError, match="cannot hold this weight: no C\\+\\+ library can be used here"):
            layouts.convert(packed(case), "strips")
        with pytest.raises(
            RuntimeError, match=f"in layout 'strips' needs a C\\+\\+ library; .*{reason}.*; or bring .* as a state dict"
        ):
            layouts.convert(strip_weight, "canonical")
    finally:
        monkeypatch.undo()
        library.forget()


def test_torch_without_its_parallel_loop_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    class Core:
        def __init__(self, path: str) -> None:
            self.path = path

    real = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda path: Core(path) if "libtorch" in path else real(path))
    library.forget()
    assert "torch_parallel_for" in (library.refuse(LEAST) or "")
    monkeypatch.undo()
    library.forget()


@pytest.mark.parametrize(
    ("case", "reason"), [(random_case(32, 60, 12), "multiple of 32"), (random_case(32, 63, 21), "multiple of 32")]
)
def test_small_groups_are_not_padded(case: Case, reason: str) -> None:
    assert ptq_kernels.prepare(*case.tensors, **case.sized).layout == "canonical"
    with pytest.raises(ValueError, match=f"'strips' cannot hold this weight: groups are padded to a {reason}"):
        layouts.convert(packed(case), "strips")
    with pytest.raises(ValueError, match="it is for the CPU, this weight is on meta"):
        layouts.convert(packed(random_case(32, 64, 32))._replace(qweight=torch.empty(32, 8, device="meta")), "strips")


def test_a_width_that_the_library_does_not_know_is_refused() -> None:
    weight = layouts.convert(packed(random_case(32, 64, 32)), "strips")
    with pytest.raises(RuntimeError, match="bits must be one of .* the library got 5"):
        strips.matmul(torch.ones(1, 64), weight._replace(bits=5), None, strips.any_library())


def test_the_build_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "SOURCE", tmp_path / "library.cpp")
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert build.main([]) == 1
    assert capsys.readouterr().out.count("a C++ compiler is required") == len(build.of_this_machine())
    monkeypatch.setenv("CXX", "c++")
    (tmp_path / "library.cpp").write_text("not C++")
    name = build.of_this_machine()[-1]
    with pytest.raises(RuntimeError, match=f"could not compile library.cpp for {name} .*use gcc 12"):
        build.compile_library(name, tmp_path)
    (tmp_path / "library.cpp").write_text("int f() { return 0; }")
    assert build.main([]) == 0
    assert {path.name for path in tmp_path.glob("*.so*")} == {build.file_name(n) for n in build.of_this_machine()}
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert build.main([]) == 1
    said = capsys.readouterr().out
    assert (
        "no CPU libraries: they are for Linux on x86_64 and aarch64 and for macOS on arm64, this is linux on ri" in said
    )
    with pytest.raises(SystemExit) as ended:
        build.main(["--help"])
    assert ended.value.code == 0
    assert "usage: python -m ptq_kernels.build" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [("linux", "aarch64", ("neon",)), ("darwin", "arm64", ("neon",)), ("darwin", "x86_64", ()), ("linux", "i686", ())],
)
def test_the_instruction_sets_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(sys, "platform", system)
    assert build.of_this_machine() == expected
    assert (build.refuse() is None) == bool(expected)
    if expected:
        monkeypatch.setattr(library, "_processor", library._processor.__wrapped__)
        assert library.preferred() == expected
        assert all(library.SETS[name] <= library._processor().flags for name in expected)


def test_the_bench_measures_what_it_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new process with pinned threads prints the table; here only that every column is there and was right."""
    path = tmp_path / "cells.json"
    assert bench_cpu.main(["128x64", "12800000x12800000"]) == 2
    assert "a shape must fit into memory: 12800000x12800000 with 512 rows needs 4259997 GB" in capsys.readouterr().err
    assert bench_cpu.main(["128x64"], [1, 20], [1, 2], str(path), seconds=0.001) == 0
    cells = json.loads(path.read_text())["cells"]
    assert {(cell["rows"], cell["threads"]) for cell in cells} == {(m, t) for m in (1, 20) for t in (1, 2)}
    assert {"dense bf16", "dense fp32", "torch only"} <= {cell["column"] for cell in cells}
    assert all(0 < cell["best_ms"] <= cell["median_ms"] for cell in cells)
    assert all(cell["error"] < (2e-2 if cell["column"] == bench_cpu.INT8 else 1e-2) for cell in cells)
    best = library.best()
    with_int8 = best is not None and best.name in library.WITH_INT8
    assert (bench_cpu.INT8 in {cell["column"] for cell in cells}) == with_int8
    monkeypatch.setattr(bench_cpu, "_CACHES", tmp_path)
    layer = bench_cpu.Layer("128x64", compiled=False)
    layer.dense.neg_()
    with pytest.raises(RuntimeError, match="dense bf16 of 128x64 with 2 rows must be within 0.01 of float64"):
        bench_cpu.measure(layer, 2, 1, 0.0)
