"""Stages of tiles_on_gpu.py: every product is right."""

import importlib.util
import itertools
import sys
import tempfile
from pathlib import Path

import gpu_plans
import order_cases
import ptq_kernels
import tile_cases
import tile_paths
import torch
from gpu_place import DEVICE, ON_GPU, captured, moved, native, on_device
from packed_weights import error_of, product_float64, random_case, random_rows, worst_error
from ptq_kernels import layouts, tiles
from ptq_kernels.layouts import PackedWeight
from ptq_kernels.triton import ahead, configs, launch


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
            there = PackedWeight(*(moved(t) for t in case.tensors), bits, 128, 256)
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


def other_tiles() -> None:
    """Every tile of this GPU of the kind that is named."""
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    if ON_GPU or sys.argv[1] not in ("pipelined", "slim"):  # which no interpreter knows
        tile_paths.other_tiles(native(), DEVICE, sys.argv[1])


def every() -> None:
    """Every tile for groups of 128, in each form that `ptq tune` times: right, and compiled by many processes."""
    part, parts = int(sys.argv[2]), int(sys.argv[3])
    n, k = (256, 2048) if ON_GPU else (128, 256)
    case, weight = on_device(native(), n, k, 128, symmetric=True)
    chosen = [t for t in configs.tiles(launch.ORDERS[native()]) if (t.bits, t.span) == (4, 128)]
    chosen = list(dict.fromkeys(tile._replace(rows=0) for tile in chosen if ON_GPU or not tile.explicit))
    splits_of = {tile: {"exact": (1, 2), "slim": (1,)}.get(tile.kind, (1, *configs.CLUSTERS)) for tile in chosen}
    forms = [(t, s, early) for t in chosen for s in splits_of[t] for early in (0, ahead.BYTES)][part::parts]
    for tile, splits, early in forms if ON_GPU else forms[:1]:
        x = random_rows(min(tile.block_m, 64), k, torch.bfloat16)
        plan = configs.Plan(tile, splits, early)
        with gpu_plans.naming(plan):
            with launch.forced(plan):
                y = launch.matmul(x.to(DEVICE), weight, None)
            error = worst_error(y.cpu(), x, case, None, tile_cases.tile_rounding(tile.kind, x.dtype))
            assert error <= 1, error


CLUSTER_SHAPES = {128: (200, 1152, 128), 64: (136, 1088, 64), 32: (200, 1056, 96)}  # eight steps and more, by the span


def clusters() -> None:
    """Every tile whose programs may be a cluster, in each size, all the rest in turns: right."""
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    part, parts = int(sys.argv[2]), int(sys.argv[3])
    found = [t for t in configs.tiles(90) if t.kind not in ("exact", "slim") and (ON_GPU or not t.explicit)]
    found = list(dict.fromkeys(tile._replace(rows=0) for tile in found)) if native() == "tile_sm90" else []
    for i, (tile, size) in [*enumerate(itertools.product(found, configs.CLUSTERS))][part :: parts if ON_GPU else 40]:
        n, k, group = CLUSTER_SHAPES[tile.span]
        dtype = (torch.bfloat16, torch.float16)[i % 2]
        case = random_case(n, k, group, tile.bits, i // 2 % 2 == 0, dtype)
        x, bias = random_rows(tile.block_m + 6 * (i % 3), k, dtype), torch.linspace(-1, 1, n).to(dtype)
        bias = bias if i % 5 else None
        plan = configs.Plan(tile, size, (0, ahead.BYTES)[i // 3 % 2])
        with gpu_plans.naming(plan):
            with launch.forced(plan):
                y = tile_cases.multiply(x, tile_cases.tiled(case, native()), bias, DEVICE)
            error = worst_error(y, x, case, bias, tile_cases.tile_rounding(tile.kind, dtype))
            assert error <= 1, (i, error)


def large() -> None:
    """A weight of more than 2**31 bytes: its last rows are as its first, by the usual plan and by every other kind."""
    (outputs, k, rows), times = (gpu_plans.LARGE, 33) if ON_GPU else ((384, 256, 3), 3)
    n = outputs // times
    case, weight = on_device(native(), n, k, 128, symmetric=False)
    x = random_rows(rows, k, torch.bfloat16)
    sizes = [tiles.tile_bytes(weight), 2 * n * tiles.groups(weight), n * tiles.groups(weight)]
    codes, *per_group = weight.qweight.split(sizes)  # then [G', N] scales, of two bytes, and zeros
    repeated = [part.view(tiles.groups(weight), -1).repeat(1, times).view(-1) for part in per_group]
    qweight = torch.cat([codes.repeat(times), *repeated])
    assert not ON_GPU or qweight.numel() > 2**31
    whole = weight._replace(qweight=qweight, scales=weight.scales.repeat(times, 1), zeros=weight.zeros.repeat(times, 1))
    layer = launch.layer_of(torch.empty(0, dtype=x.dtype, device=DEVICE), whole, None)
    problem = configs.Problem(4, layer.span, rows, outputs, k, layer.explicit)
    product = product_float64(x, case)
    for plan in (layer.plan(rows), *gpu_plans.one_of_each(layer.table, problem)):
        with gpu_plans.naming(plan):
            with launch.forced(plan):
                y = launch.matmul(x.to(DEVICE), whole, None).cpu().view(rows, times, n)
            error = error_of(y[:, -1], product, None, tile_cases.tile_rounding(plan.tile.kind, x.dtype))
            assert error <= 1, error
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


def permuted() -> None:
    """Weights with scattered groups, by every kernel; and in a CUDA graph, whose gathered rows are its own."""
    torch.use_deterministic_algorithms(True)  # fresh memory holds NaN
    for spec in order_cases.SPECS[: None if ON_GPU else 2]:
        for bits in (2, 4, 8) if ON_GPU else (4,):
            error = order_cases.worst(spec._replace(bits=bits), "triton", device=DEVICE)
            assert error <= 1, (spec, bits, error)
    case, _ = on_device(native(), 256, 512, 128, symmetric=False)
    tensors = [moved(t) for t in case.tensors]
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
    for group in (128, 64, 32) if ON_GPU else (128,):
        case, weight = on_device(native(), 200, 2048, group, symmetric=False)
        x = random_rows(3, 2048, torch.bfloat16)
        rounding = tile_cases.weight_rounding(weight, len(x), x.dtype, DEVICE)
        assert worst_error(launch.matmul(x.to(DEVICE), weight, None).cpu(), x, case, None, rounding) <= 1, group
    for kind in ("raised", "folded") if ON_GPU and native() == "tile_sm90" else ():
        tile = next(t for t in configs.tiles(90) if (t.kind, t.bits, t.span) == (kind, 4, 128))
        case, weight = on_device(native(), 200, 1152, 128, symmetric=False)
        x, bias = random_rows(tile.block_m + 1, 1152, torch.bfloat16), torch.linspace(-1, 1, 200).to(torch.bfloat16)
        with launch.forced(configs.Plan(tile, 8)):
            y = launch.matmul(x.to(DEVICE), weight, bias.to(DEVICE)).cpu()
        assert worst_error(y, x, case, bias, tile_cases.tile_rounding(kind, torch.bfloat16)) <= 1, kind
