"""The dense weight in chunks: how many rows each has, and the kernel for 4 bits, compiled and run in the emulator."""

import os

import pytest
import tile_cases
import torch
from emulated_launches import Emulator
from packed_weights import dense_float64, random_case, random_rows
from recorded_launches import Launched, recorded

pytest.importorskip("triton", reason="the kernels are written in Triton")

from ptq_kernels.triton import dense, dequant, launch

needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="compilation needs Triton without its interpreter"
)
BF16, FP16 = torch.bfloat16, torch.float16
H200, L2 = 132, 60 * 2**20

# N, K, group size, dtype, symmetric: whole and ragged rows, several chunks; columns that end in the middle of a step, a
# tile, of what is stored at once; groups that a step or a tile straddles, one group a row
WEIGHTS = [
    (130, 256, 128, BF16, True),
    (130, 256, 128, FP16, False),
    (64, 192, 64, BF16, False),
    (300, 160, 32, FP16, True),
    (40, 288, 96, BF16, False),
    (72, 384, 192, FP16, False),
    (65, 62, 62, BF16, True),
    (33, 200, 200, FP16, False),
]


@needs_compiler
@pytest.mark.parametrize("layout", ["tile_sm90", "tile_sm80"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda w: f"{w[0]}x{w[1]}g{w[2]}")
def test_the_dense_weight_of_words(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, layout: str, weight: tuple[int, int, int, torch.dtype, bool]
) -> None:
    """Oracle, exact: the float64 weight, of an integer and a scale, rounded once."""
    n, k, group, dtype, symmetric = weight
    case = random_case(n, k, group, 4, symmetric, dtype)
    tiled = tile_cases.tiled(case, layout)
    made = launch.layer_of(torch.empty(1, k, dtype=dtype), tiled, None).dense
    assert made.kernel is dequant.words_kernel
    monkeypatch.setattr(dense, "chunk_rows", lambda *_: 128)
    found = torch.cat([rows.clone() for _, rows in made.chunks(tiled.qweight, 1, 0)])
    assert torch.equal(found, dense_float64(case).to(dtype))


@needs_compiler
def test_negative_scales_and_tiny_ones(emulator: Emulator) -> None:
    """Oracle as above; zeros have the sign of their scale's product, and values below the normal ones are not lost."""
    case = random_case(128, 128, 128, 4, True, FP16)
    scales = torch.full_like(case.scales, 2.0**-24)
    scales[1::3] = -0.37
    case = case._replace(scales=scales)
    tiled = tile_cases.tiled(case, "tile_sm90")
    made = launch.layer_of(torch.empty(1, 128, dtype=FP16), tiled, None).dense
    ((_, found),) = made.chunks(tiled.qweight, 1, 0)
    assert torch.equal(found, dense_float64(case).to(FP16))
    assert (found.abs() < 2.0**-14).any()


@needs_compiler
@pytest.mark.parametrize("k", [61, 256])
def test_other_weights_take_the_other_kernel(launches: list[Launched], k: int) -> None:
    """Rows of an odd length, scales of another dtype, 8 bits."""
    for bits, scales, rows in ((4, BF16, BF16), (4, BF16, FP16), (4, torch.float32, torch.float32), (8, BF16, BF16)):
        weight = tile_cases.tiled(random_case(64, k, k, bits, True, scales), "tile_sm90")
        launch._matmul(random_rows(600, k, rows), weight, None, 0)
        words = (bits, scales, rows, k % 2) == (4, BF16, BF16, 0)
        assert launches[-1].kernel == ("words_kernel" if words else "dequantize_kernel")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """Every launch, in order."""
    yield from recorded(monkeypatch, tmp_path)


@needs_compiler
def test_it_is_compiled_once_and_not_during_a_capture(
    launches: list[Launched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every chunk of every product is one launch of one compiled kernel."""
    from ptq_kernels.triton import workspace

    weight = tile_cases.tiled(random_case(300, 256, 128, dtype=BF16), "tile_sm90")
    monkeypatch.setattr(dense, "chunk_rows", lambda *_: 256)
    launch._matmul(random_rows(600, 256, BF16), weight, None, 0)
    monkeypatch.setattr(workspace, "capturing", lambda device: True)
    launch._matmul(random_rows(700, 256, BF16), weight, None, 3)
    assert [(each.grid, each.values["first_row"], each.stream) for each in launches] == [
        ((4, 2, 1), 0, 0), ((2, 2, 1), 256, 0), ((4, 2, 1), 0, 3), ((2, 2, 1), 256, 3)
    ]  # fmt: skip
    assert len({each.handed[0] for each in launches}) == 1
    with pytest.raises(RuntimeError, match="dequantizes a 300 x 256 weight must be compiled before a CUDA graph"):
        launch._matmul(random_rows(600, 256, FP16), weight, None, 0)


@pytest.mark.parametrize(
    ("rows", "n", "k", "want"),
    [
        (2048, 4096, 4096, 4096),  # 2 waves of 128 x 256, as for the whole weight
        (2048, 28672, 4096, 4096),  # 14 waves; 4 chunks of 7168 rows would take 16
        (2048, 4096, 14336, 2048),  # 2 waves of 128 tiles; the 1152 rows of a chunk of 32 MiB would take 4
        (2048, 128256, 4096, 4096),
        (512, 4096, 4096, 4096),
        (2048, 14336, 4096, 4096),  # 3 times 2 waves and 1; halves would take 8
        (1, 1000, 4096, 1024),
        (512, 256, 2**21, 128),  # a tile of rows is larger than the cache
    ],
)
def test_rows_of_a_chunk(rows: int, n: int, k: int, want: int) -> None:
    assert dense.chunk_rows(H200, L2, rows, n, 2 * k) == want


def test_no_size_is_done_sooner() -> None:
    """Oracle: waves of tiles of 128 x 256, counted chunk by chunk; as many as for the whole weight, or few more."""
    for rows, n, k in ((2048, 14336, 4096), (2048, 11008, 4096), (4096, 5120, 13824), (1024, 151936, 1024)):
        size = dense.chunk_rows(H200, L2, rows, n, 2 * k)
        assert size % 128 == 0
        assert size * 2 * k <= L2
        parts = [min(size, n - start) for start in range(0, n, size)]
        waves = [-(-(-(-rows // 128) * -(-part // 256)) // H200) for part in parts]
        assert sum(waves) <= 1.07 * -(-(-(-rows // 128) * -(-n // 256)) // H200), (n, k, size)
