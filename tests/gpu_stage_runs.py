"""Stages of tiles_on_gpu.py: products in every way that a program may run them, the same bits each time."""

import contextlib
from functools import partial
from unittest.mock import patch

import gpu_plans
import ptq_kernels
import tile_cases
import torch
from gpu_place import DEVICE, ON_GPU, captured, native, on_device
from packed_weights import Product, error_of, product_float64, random_rows, worst_error
from ptq_kernels import torch_op
from ptq_kernels.layouts import PackedWeight
from ptq_kernels.triton import configs, launch, recipes, workspace
from torch import Tensor


def repeat() -> None:
    """Split over K, a poisoned workspace, the same bits every time, counters back at 0."""
    for n, k, rows, times in gpu_plans.REPEATED if ON_GPU else [(256, 1024, 5, 3)]:
        case, weight = on_device(native(), n, k, 128, symmetric=True)
        x = random_rows(rows, k, torch.bfloat16)
        gpu = launch.gpu(0) if ON_GPU else configs.Gpu(90, 132)
        problem = configs.Problem(4, 128, rows, n, k, ON_GPU and recipes.explicit(gpu, k))
        product = product_float64(x, case)  # seconds of a processor, for all plans
        for plan in gpu_plans.repeated(gpu, problem):
            with gpu_plans.naming(plan):
                _repeated(plan, x, weight, product, times)


def _repeated(plan: configs.Plan, x: Tensor, weight: PackedWeight, product: Product, times: int) -> None:
    there, rows = x.to(DEVICE), x.shape[0]
    stream = torch.cuda.current_stream().cuda_stream if ON_GPU else 0
    space = workspace.get(there.device, stream)
    with launch.forced(plan):
        first = launch.matmul(there, weight, None)
        rounding = tile_cases.weight_rounding(weight, rows, x.dtype, DEVICE)
        error = error_of(first.cpu(), product, None, rounding)
        assert error <= 1, error
        differing = torch.zeros((), dtype=torch.long, device=DEVICE)
        for _ in range(times):
            space.parts.fill_(float("nan"))
            y = torch.full_like(first, float("nan"))
            y.copy_(launch.matmul(there, weight, None))
            differing += (y.view(torch.int16) != first.view(torch.int16)).sum()
    assert int(differing) == 0, f"{int(differing)} elements changed in {times} runs"
    assert not space.counters.any()


def chain() -> None:
    """Each product takes the result of the one before, which its kernel begins before: as if every one were awaited."""
    sizes = (1024, 2048, 512, 2048, 1024, 4096) if ON_GPU else (128, 256)
    weights = [
        on_device(native(), n, k, 128, symmetric=True)[1]
        for k, n in zip(sizes, (*sizes[1:], sizes[0]), strict=True)
    ]  # fmt: skip

    def product(x: Tensor, weight: PackedWeight) -> Tensor:
        return launch.matmul(x, weight, None).clamp_(-1, 1) if x.shape[0] % 2 else launch.matmul(x, weight, None)

    for rows in (1, 2, 16, 33, 70, 200) if ON_GPU else (2,):
        first = random_rows(rows, sizes[0], torch.bfloat16).to(DEVICE) * 0.1
        for weight in weights:
            launch.warmup(weight, torch.bfloat16)
        x = first
        for weight in weights:
            x = product(x, weight)
            if ON_GPU:
                torch.cuda.synchronize()

        def every(first: Tensor = first) -> Tensor:
            y = first
            for weight in weights:
                y = product(y, weight)
            return y

        assert torch.isfinite(x).all()
        assert x.abs().max() > 0
        replay = captured(every)
        for _ in range(300 if ON_GPU else 1):
            assert torch.equal(replay(), x), rows
        for _ in range(300 if ON_GPU else 1):
            assert torch.equal(every(), x), rows


def streams() -> None:
    """Split products of several streams at the same time: each has counters and parts of its own."""
    case, weight = on_device(native(), 4096, 4096, 128, symmetric=False) if ON_GPU else on_device(
        native(), 256, 1024, 128, symmetric=False
    )  # fmt: skip
    k = case.codes.shape[1]
    rows = [random_rows(m, k, torch.bfloat16).to(DEVICE) for m in (1, 7, 16, 33)]
    want = [launch.matmul(x, weight, None) for x in rows]
    if not ON_GPU:
        return
    torch.cuda.synchronize()
    beside = [torch.cuda.Stream() for _ in rows]
    found: list[list[Tensor]] = [[] for _ in rows]
    for _ in range(50):
        for x, stream, results in zip(rows, beside, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(launch.matmul(x, weight, None))
    torch.cuda.synchronize()
    for y, results in zip(want, found, strict=True):
        assert all(torch.equal(y, each) for each in results)
    side = torch.cuda.Stream()
    launch.forget()
    workspace._of_stream.clear()
    workspace._spare.clear()
    with torch.cuda.stream(side):  # a warm-up where torch's documentation has it: on a stream that is not the default
        launch.warmup(weight, torch.bfloat16)
    side.synchronize()
    replay = captured(lambda: launch.matmul(rows[0], weight, None))
    assert torch.equal(replay(), want[0])


def graph() -> None:
    """Capture after a warm-up, replay on new rows, also where a copy that is no kernel brings them; and the message
    where there was no warm-up."""
    case, weight = on_device(native(), 512, 2048, 128, symmetric=False)
    launch.warmup(weight, torch.bfloat16)
    for rows in (1, 17, 100, 300, 600) if ON_GPU else (1, 17, 600):
        x = random_rows(rows, 2048, torch.bfloat16)
        there = torch.zeros(rows, 2048, dtype=torch.bfloat16, device=DEVICE)
        for elsewhere in (None, torch.zeros_like(there)):
            if ON_GPU:
                recorded = torch.cuda.CUDAGraph()
                with torch.cuda.graph(recorded):
                    if elsewhere is not None:
                        there.copy_(elsewhere)
                    y = launch.matmul(there, weight, None)
                for _ in range(3):
                    y.fill_(float("nan"))
                    there.fill_(float("nan"))
                    (there if elsewhere is None else elsewhere).copy_(x)
                    recorded.replay()
                torch.cuda.synchronize()
            else:
                there.copy_(x)
                y = launch.matmul(there, weight, None)
            assert worst_error(y.cpu(), x, case, None, tile_cases.weight_rounding(weight, rows, x.dtype, DEVICE)) <= 1
    if ON_GPU:
        launch.forget()
        refusal = "none"
        with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            try:
                launch.matmul(there[:1], weight, None)
            except RuntimeError as error:
                refusal = str(error)
                raise
        if "must be compiled before" not in refusal:
            raise AssertionError(f"an uncompiled kernel must be refused during capture, got {refusal}")


def eager() -> None:
    """The short way of `ptq_kernels.matmul`, bit for bit as the operator: at once, on another stream, in a graph."""
    _, weight = on_device(native(), 512, 2048, 128, symmetric=False)
    bias = torch.linspace(-1, 1, 512, device=DEVICE)
    named = {"bits": 4, "group_size": 128, "layout": weight.layout, "impl": "triton"}

    def refused(*_arguments: object) -> None:
        raise AssertionError("the operator was called")

    for rows in (1, 17, 200) if ON_GPU else (1, 17):
        x = random_rows(rows, 2048, torch.bfloat16).to(DEVICE)
        want = torch_op.matmul(x, *weight[:3], bias, 4, 128, weight.layout, "triton")
        product = partial(ptq_kernels.matmul, x, *weight[:3], bias, **named)
        product()
        with patch.object(torch_op, "matmul", refused), torch.no_grad():
            assert torch.equal(product(), want), rows
            assert torch.equal(captured(product)(), want), rows
            if ON_GPU:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    found = [product() for _ in range(20)]
                assert torch.equal(product(), want), rows
                torch.cuda.synchronize()
                assert all(torch.equal(each, want) for each in found), rows
    if ON_GPU:
        weight.qweight.data = weight.qweight.cpu()
        try:
            product()
        except ValueError as error:
            if "must be on the device of qweight" not in str(error):
                raise
        else:
            raise AssertionError("a weight that was moved to the CPU must be refused")


def compiled() -> None:
    """torch.compile, whole and once for any number of rows; with CUDA graphs where there is a GPU."""
    case, weight = on_device(native(), 256, 512, 128, symmetric=False)

    def forward(x: Tensor) -> Tensor:
        return ptq_kernels.matmul(
            x * 2, *weight[:3], bits=4, group_size=128, layout=weight.layout, impl="triton"
        ).relu()  # fmt: skip

    dynamic = torch.compile(forward, fullgraph=True, dynamic=True, backend="inductor" if ON_GPU else "eager")
    for rows in (3, 70) if not ON_GPU else (3, 7, 70, 300, 600):
        x = random_rows(rows, 512, torch.bfloat16)
        assert torch.equal(dynamic(x.to(DEVICE)), forward(x.to(DEVICE))), rows
    if ON_GPU:
        workspace._of_stream.clear()  # nothing was warmed up: torch claims what its own warm-up allocates
        workspace._spare.clear()
        reduced = torch.compile(forward, fullgraph=True, mode="reduce-overhead")
        x = random_rows(1, 512, torch.bfloat16).to(DEVICE)
        for _ in range(4):
            y = reduced(x).clone()
        assert torch.equal(y, forward(x))
    y = ptq_kernels.matmul(x := x.to(DEVICE), *weight[:3], bits=4, group_size=128, layout=weight.layout, impl="triton")
    rounding = tile_cases.weight_rounding(weight, len(x), x.dtype, DEVICE)
    assert worst_error(y.cpu(), x.cpu(), case, None, rounding) <= 1
