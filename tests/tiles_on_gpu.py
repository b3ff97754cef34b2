"""The kernels for fragment-order weights run for real; scripts/gpu_check starts this program, pytest does not.

Run:    python tests/tiles_on_gpu.py STAGE [early], where STAGE is "cases PART PARTS" or a name in STAGES
With "early" every kernel begins before the one before it has ended, whatever the table says (ptq_kernels.triton.ahead).
Every stage asserts. Without a GPU each runs on the CPU in Triton's interpreter, in little, to try the program itself.
"""

import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

os.environ["PTQ_KERNELS_CONFIGS"] = os.devnull + ".json"  # no table of this machine's user
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")
# With it cuBLAS is deterministic; without it torch refuses its products where fresh memory is to hold NaN.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import order_cases
import ptq_kernels
import tile_cases
import tile_paths
import torch
from packed_weights import UNIT, random_case, random_rows, worst_error
from ptq_kernels import layouts, tiles, torch_op
from ptq_kernels.layouts import PackedWeight
from ptq_kernels.triton import ahead, configs, launch, workspace
from torch import Tensor

ON_GPU = os.environ["TRITON_INTERPRET"] == "0"
DEVICE = "cuda" if ON_GPU else "cpu"


def on_device(layout: str, n: int, k: int, group: int, *, symmetric: bool) -> tuple[tile_cases.Case, PackedWeight]:
    """A random case, and its weight where the kernels are."""
    case = random_case(n, k, group, 4, symmetric, torch.bfloat16)
    return case, tile_cases.on_device(tile_cases.tiled(case, layout), DEVICE)


def _moved(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None else tensor.to(DEVICE)


def native() -> str:
    """The layout of this GPU."""
    order = launch.gpu(0).order if ON_GPU else 90
    return next(name for name, value in launch.ORDERS.items() if value == order)


def cases() -> None:
    """Random products against float64, poisoned outputs; then integers, which must be exact."""
    part, parts = int(sys.argv[2]), int(sys.argv[3])
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    specs = [*tile_cases.native_specs(native()), *tile_cases.few_specs()][part::parts]
    for spec in specs if ON_GPU else specs[:2]:
        error = tile_cases.check(spec, DEVICE)
        assert error <= 1, (spec.name, error)
        assert tile_cases.exact(spec, DEVICE), spec.name


def identity() -> None:
    """The rows of an identity matrix read the weight itself, bit for bit; packed here and on the CPU alike."""
    for layout in launch.ORDERS:
        for bits in (4, 8):
            case = random_case(192, 256, 128, bits, symmetric=False)
            case = case._replace(scales=torch.sign(case.scales).bfloat16())
            weight = tile_cases.tiled(case, layout)
            there = PackedWeight(*(_moved(t) for t in case.tensors), bits, 128, 256)
            if layout == native():
                assert torch.equal(layouts.convert(there, layout).qweight.cpu(), weight.qweight)
            for dtype in (torch.bfloat16, torch.float16):
                y = tile_cases.multiply(torch.eye(256, dtype=dtype), weight, None, DEVICE)
                dense = ptq_kernels.dequantize(*case.tensors, bits=bits, group_size=128, in_features=256)
                assert torch.equal(y.T.float(), dense), (layout, bits, dtype)


def paths() -> None:
    """What is true of every way through the product, and its gradient; the layout of other GPUs as well."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory holds NaN
    for layout in launch.ORDERS if ON_GPU else [native()]:
        tile_paths.everything(layout, DEVICE)


def folded() -> None:
    """Every folded tile of this GPU."""
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    tile_paths.folded(native(), DEVICE)


def large() -> None:
    """A weight of more than 2**31 bytes: its last rows are as its first."""
    times, n, k = (33, 4096, 32768) if ON_GPU else (3, 128, 256)
    case, weight = on_device(native(), n, k, 128, symmetric=False)
    x = random_rows(3, k, torch.bfloat16)
    sizes = [tiles.tile_bytes(weight), 2 * n * tiles.groups(weight), n * tiles.groups(weight)]
    codes, *per_group = weight.qweight.split(sizes)  # then [G', N] scales, of two bytes, and zeros
    repeated = [part.view(tiles.groups(weight), -1).repeat(1, times).view(-1) for part in per_group]
    qweight = torch.cat([codes.repeat(times), *repeated])
    assert not ON_GPU or qweight.numel() > 2**31
    whole = weight._replace(qweight=qweight, scales=weight.scales.repeat(times, 1), zeros=weight.zeros.repeat(times, 1))
    y = launch.matmul(x.to(DEVICE), whole, None).cpu().view(3, times, n)
    assert worst_error(y[:, -1], x, case, None, 0.0) <= 1
    assert torch.equal(y, y[:, :1].expand_as(y))


def generate() -> None:
    """A packed checkpoint through `ptq.load` and `generate` with a static cache, fused and not: as on the CPU."""
    if importlib.util.find_spec("transformers") is None:
        print("transformers is not installed: left out")
        return
    import ptq
    from benchmarks.whole_model.checkpoints import Packing, write_checkpoint
    from benchmarks.whole_model.shapes import SHAPES

    prompt = torch.arange(5, 17).view(1, -1)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(SHAPES["tiny"], Packing(128, head=False), Path(folder) / "model")
        want = ptq.load(Path(folder) / "model", device="cpu", impl="reference")(prompt).logits
        for fuse in (False, True):
            model = ptq.load(Path(folder) / "model", device=DEVICE, fuse=fuse, impl="triton")
            got = model(prompt.to(DEVICE)).logits.cpu()
            error = torch.linalg.vector_norm(got.float() - want.float()) / torch.linalg.vector_norm(want.float())
            assert error < 3e-2, float(error)
            options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
            assert model.generate(prompt.to(DEVICE), **options).shape == (1, 20)


REPEATED = [(4096, 4096, 5, 1000), (1024, 4096, 16, 1000), (4096, 14336, 64, 1000), (4096, 4096, 200, 1000)]


def repeat() -> None:
    """Split over K, a poisoned workspace, the same bits every time, counters back at 0."""
    for n, k, rows, times in REPEATED if ON_GPU else [(256, 1024, 5, 3)]:
        case, weight = on_device(native(), n, k, 128, symmetric=True)
        x = random_rows(rows, k, torch.bfloat16)
        gpu = launch.gpu(0) if ON_GPU else configs.Gpu(90, 132)
        plan = configs.plan(gpu, configs.Problem(4, 128, rows, n, k))
        usual = plan._replace(splits=max(plan.splits, 2))
        folded = [t for t in configs.candidates(gpu, configs.Problem(4, 128, rows, n, k)) if t.folded]
        for plan in (usual, *(usual._replace(tile=tile) for tile in folded[:1])):
            _repeated(plan, x, weight, case, times)


def _repeated(plan: configs.Plan, x: Tensor, weight: PackedWeight, case: tile_cases.Case, times: int) -> None:
    there, rows = x.to(DEVICE), x.shape[0]
    stream = torch.cuda.current_stream().cuda_stream if ON_GPU else 0
    space = workspace.get(there.device, stream)
    with launch.forced(plan):
        first = launch.matmul(there, weight, None)
        rounding = tile_cases.weight_rounding(weight, rows, x.dtype, DEVICE)
        assert worst_error(first.cpu(), x, case, None, rounding) <= 1
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
    """Capture after a warm-up, replay on new rows; and the message where there was no warm-up."""
    case, weight = on_device(native(), 512, 2048, 128, symmetric=False)
    launch.warmup(weight, torch.bfloat16)
    for rows in (1, 17, 100, 300, 600) if ON_GPU else (1, 17, 600):
        x = random_rows(rows, 2048, torch.bfloat16)
        there = torch.zeros(rows, 2048, dtype=torch.bfloat16, device=DEVICE)
        if ON_GPU:
            recorded = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recorded):
                y = launch.matmul(there, weight, None)
            there.copy_(x)
            for _ in range(3):
                y.fill_(float("nan"))
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
    assert worst_error(y.cpu(), x.cpu(), case, None, UNIT[torch.bfloat16]) <= 1


def permuted() -> None:
    """Weights with scattered groups, by every kernel; and in a CUDA graph, whose gathered rows are its own."""
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    for spec in order_cases.SPECS[: None if ON_GPU else 2]:
        for bits in (2, 4, 8) if ON_GPU else (4,):
            error = order_cases.worst(spec._replace(bits=bits), "triton", 0.0, DEVICE)
            assert error <= 1, (spec, bits, error)
    case, _ = on_device(native(), 256, 512, 128, symmetric=False)
    tensors = [_moved(t) for t in case.tensors]
    prepared = ptq_kernels.prepare(*tensors, g_idx=order_cases.scattered(512, 128), impl="triton", **case.sized)
    named = {"layout": prepared.layout, "impl": "triton", "perm": prepared.perm, **case.scheme}
    ptq_kernels.warmup(*prepared[:3], in_features=512, dtype=torch.bfloat16, **named)
    for rows in (1, 300, 600) if ON_GPU else (1,):
        x = random_rows(rows, 512, torch.bfloat16).to(DEVICE)
        want = ptq_kernels.matmul(x, *prepared[:3], **named)
        there = torch.zeros_like(x)
        replay = captured(lambda there=there: ptq_kernels.matmul(there, *prepared[:3], **named))
        there.copy_(x)
        ptq_kernels.matmul(-x, *prepared[:3], **named)  # gathers elsewhere
        assert torch.equal(replay(), want), rows


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call in a CUDA graph; without a GPU the call itself."""
    if not ON_GPU:
        return call
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        y = call()

    def replay() -> Tensor:
        recorded.replay()
        torch.cuda.synchronize()
        return y

    return replay


def loaded() -> None:
    """What `ptq.load` makes of a head and of a fused act-order layer, warmed up and captured before it ever ran."""
    from ptq.formats.codec import QuantizedWeight
    from ptq.nn.head import pack_head
    from ptq.nn.linear import QuantLinear

    torch.manual_seed(0)
    outputs, width = (32000, 2048) if ON_GPU else (100, 256)
    head = torch.nn.Linear(width, outputs, bias=False, dtype=torch.bfloat16, device=DEVICE)
    case = random_case(width, width, 128, 4, symmetric=False, dtype=torch.float16)
    weight = QuantizedWeight(case.codes, case.scales.float(), case.zeros, 4, 128, False)
    layer = QuantLinear.from_quantized(weight, None, torch.float16, order_cases.scattered(width, 128)).to(DEVICE)
    layers = [layer, pack_head(head, 4), pack_head(head, 8)]
    for each in layers:
        each.impl = "triton"
        each.prepare_()
        each.warmup(torch.bfloat16)
    for rows in (1, 17, 300, 600) if ON_GPU else (1, 17):
        x = torch.randn(rows, width, device=DEVICE).to(torch.bfloat16)
        for each in layers:
            there = torch.zeros_like(x)
            replay = captured(lambda each=each, there=there: each(there))
            there.copy_(x)
            want = x.double() @ each.dequantize(torch.float32).double().T
            error = torch.linalg.vector_norm(replay().double() - want) / torch.linalg.vector_norm(want)
            assert error < 5e-3, (rows, repr(each), float(error))  # bfloat16 rounds results, and many rows the weight


def memcheck() -> None:
    """A few ragged products, for compute-sanitizer to watch: of every kernel, and split ones."""
    scale, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    specs = [
        tile_cases.Spec(native(), 4, (130, 256, 64), bf16, True, 1, scale, True),
        tile_cases.Spec(native(), 4, (65, 60, 60), fp16, False, 17, scale, False),
        tile_cases.Spec(native(), 4, (70, 160, 32), bf16, False, 64, scale, True),
        tile_cases.Spec(native(), 4, (200, 200, 200), bf16, True, 200, scale, False),
        tile_cases.Spec(native(), 8, (130, 256, 64), bf16, False, 3, scale, True),
        tile_cases.Spec(native(), 8, (72, 384, 192), fp16, True, 65, scale, False),
        tile_cases.Spec(native(), 4, (130, 256, 64), bf16, False, 600, scale, True),  # dequantized
        tile_cases.Spec(native(), 8, (65, 60, 60), fp16, True, 600, scale, False),
        tile_cases.Spec("canonical", 3, (65, 60, 60), bf16, False, 17, scale, True),
        tile_cases.Spec("canonical", 4, (130, 256, 64), fp16, True, 65, scale, False),
    ]
    for spec in specs if ON_GPU else specs[::3]:
        assert tile_cases.check(spec, DEVICE) <= 1, spec.name
    for group in (128, 64, 32) if ON_GPU else (64,):
        case, weight = on_device(native(), 200, 2048, group, symmetric=False)
        x = random_rows(3, 2048, torch.bfloat16)
        assert worst_error(launch.matmul(x.to(DEVICE), weight, None).cpu(), x, case, None, 0.0) <= 1, group


STAGES = {
    "cases": cases,
    "chain": chain,
    "folded": folded,
    "generate": generate,
    "large": large,
    "layouts": identity,
    "paths": paths,
    "repeat": repeat,
    "streams": streams,
    "graph": graph,
    "eager": eager,
    "compile": compiled,
    "memcheck": memcheck,
    "permuted": permuted,
    "loaded": loaded,
}


def begin_early() -> None:
    """From now on every plan."""
    usual = configs.plan

    def early(gpu: configs.Gpu, problem: configs.Problem) -> configs.Plan:
        return usual(gpu, problem)._replace(early=ahead.BYTES)

    configs.plan = early


if __name__ == "__main__":
    if sys.argv[-1] == "early":
        begin_early()
    STAGES[sys.argv[1]]()
    print(sys.argv[1], "passed on", torch.cuda.get_device_name() if ON_GPU else "the interpreter")
