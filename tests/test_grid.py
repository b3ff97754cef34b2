"""Grids and their search. Oracles: tests/oracles.py, trying every code and every candidate in float64."""

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptq import grid_search
from ptq.errors import ConfigError, NumericsError
from ptq.formats.codec import Scheme
from ptq.grid import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Grid,
    grouped,
    min_max_grid,
    nearest_codes,
    pack_result,
    resolve_group_size,
    round_scales,
    values,
)
from ptq.grid_search import SHRINKS, diagonal_blocks, search_grid
from ptq.loss import NARROWEST, PANELS, quadratic_loss, rounding_loss
from ptq.rtn import rtn_solve

BITS = [2, 3, 4, 8]
SCHEMES = [Scheme(bits, size, symmetric) for bits in BITS for size in (8, -1) for symmetric in (True, False)]


def weight(rows=5, columns=24, seed=0):
    return oracles.random_weight(rows, columns, seed)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
       st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))  # fmt: skip
@settings(max_examples=300, deadline=None, derandomize=True)
def test_rounded_scales_are_exact_in_the_checkpoint(numbers, dtype):
    scales = torch.tensor(numbers, dtype=torch.float32)
    rounded = round_scales(scales, dtype)
    held = [torch.float16, torch.bfloat16] if dtype == torch.bfloat16 else [torch.float16]
    for each in held:
        assert torch.equal(rounded.to(each).float(), rounded)
    assert torch.equal(rounded.signbit(), scales.signbit())
    assert bool((rounded.abs() >= SMALLEST_SCALE).all())
    assert bool((rounded.abs() <= LARGEST_SCALE).all())
    assert torch.equal(round_scales(rounded, dtype), rounded)
    # Half an ulp: of bfloat16, and of float16 at 2**-17, where its subnormals are 2**-24 apart, that is 2**-8.
    clamped = scales.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    assert bool(((rounded.abs() - clamped).abs() <= 2.0**-8 * clamped).all())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_min_max_grid_holds_every_weight_within_half_a_step(scheme):
    w = weight()
    w[:, 3] = 0
    grid = min_max_grid(w, scheme)
    group_size = 24 if scheme.group_size == -1 else 8
    assert grid.scales.shape == grid.zeros.shape == (5, 24 // group_size)
    found = values(nearest_codes(w, grid), grid)
    # Half a step, and what rounding the scale to float16 (2**-11) takes off a range of at most 2**bits steps.
    step = grid.scales.repeat_interleave(group_size, 1)
    assert bool(((found - w).abs() <= step * (0.5 + 2**scheme.bits * 2.0**-11)).all())
    assert bool((found[:, 3] == 0).all())  # zero is always on the grid
    if scheme.symmetric:
        assert bool((grid.zeros == 2 ** (scheme.bits - 1)).all())
        exact = 2 * grouped(w, group_size).abs().amax(-1) / grid.top
        torch.testing.assert_close(grid.scales, exact, rtol=2.0**-11, atol=0)  # float16's unit roundoff


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_nearest_codes_are_nearest(scheme):
    w = weight(3)
    grid = min_max_grid(0.7 * w, scheme)  # so that some weights lie outside
    found = nearest_codes(w, grid)
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), oracles.round_to_codes(w, grid.scales, grid.zeros, grid.top))


def test_ties_go_to_the_even_code():
    grid = Grid(torch.tensor([[2.0]]), torch.tensor([[8.0]]), 4, 4, True)
    assert nearest_codes(torch.tensor([[-3.0, -1.0, 1.0, 3.0]]), grid).tolist() == [[6, 8, 8, 10]]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_values_are_what_every_reader_computes(scheme):
    w = weight().float()
    grid = min_max_grid(w, scheme)
    codes = nearest_codes(w, grid)
    packed = pack_result(codes, grid)
    assert packed.scales.dtype == torch.float32
    assert packed.zeros.dtype == torch.uint8
    assert torch.equal(packed.dequantize(), values(codes, grid))
    # one float32 rounding of an exact product
    exact = oracles.dequantize(codes, grid.scales, grid.zeros)
    assert torch.equal(values(codes, grid), exact.float())
    for mine, rtn in zip(packed, rtn_solve(w, scheme), strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(rtn))


def test_rounding_a_bfloat16_weight_is_done_in_float32():
    w = weight().bfloat16()
    for mine, of_float in zip(rtn_solve(w, SCHEMES[0]), rtn_solve(w.float(), SCHEMES[0]), strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(of_float))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("make", [min_max_grid, lambda w, scheme: search_grid(w, torch.ones(w.shape[1]), scheme)])
def test_degenerate_groups(make, symmetric):
    w = torch.zeros(1, 16)
    w[0, 8:] = -3.0
    grid = make(w, Scheme(4, 8, symmetric))
    assert float(grid.scales[0, 0]) == SMALLEST_SCALE
    found = values(nearest_codes(w, grid), grid)
    assert bool((found[0, :8] == 0).all())
    # the scale of the constant group is rounded to float16, and at worst half a step is lost
    assert bool(((found[0, 8:] + 3).abs() <= grid.scales[0, 1].abs() * 0.51).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_must_be_finite(bad):
    w = weight()
    w[1, 2] = w[3, 4] = bad
    for make in (min_max_grid, lambda w, scheme: search_grid(w, torch.ones(24), scheme)):
        with pytest.raises(NumericsError, match="weight must be finite; 2 of 120 values are NaN or infinite: check"):
            make(w, SCHEMES[0])


def test_group_sizes():
    assert resolve_group_size(Scheme(4, -1, True), 30) == 30
    assert resolve_group_size(Scheme(4, 10, True), 30) == 10
    with pytest.raises(ConfigError, match="a.b has 96, which 128 does not divide: use 32 or 16, or -1, or exclude"):
        resolve_group_size(Scheme(4, 128, True), 96, "a.b")
    with pytest.raises(ConfigError, match=r"weight has 30, which 128 does not divide: use -1 \(one group a row\)"):
        min_max_grid(weight(2, 30), Scheme(4, 128, True))


def hessian(columns=24, seed=0):
    return oracles.second_moment([oracles.correlated_inputs(40, columns, seed)])


def candidates(w, scheme, start):
    """The grids search_grid promises to try, for one group: float64 scales as a float16 checkpoint holds them."""

    def held(scale):
        return float(round_scales(torch.tensor(scale, dtype=torch.float64), torch.float16))

    yield start
    if scheme.symmetric:
        largest = float(w[w.abs().argmax()])
        for shrink in SHRINKS:
            for sign in (-1, 1):
                yield held(sign * shrink * largest / 2 ** (scheme.bits - 1)), start[1]
        return
    top = 2**scheme.bits - 1
    for shrink in SHRINKS:
        for shift in (-1, 0, 1):
            yield held(shrink * start[0]), float(min(max(start[1] + shift, 0), top))


@pytest.mark.parametrize("blocks", [False, True], ids=["diagonal", "blocks"])
@pytest.mark.parametrize("bits", BITS[:3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_search_equals_brute_force(bits, symmetric, blocks, monkeypatch):
    monkeypatch.setattr(grid_search, "REFITS", 0)
    scheme, w, H = Scheme(bits, 8, symmetric), weight(8), hessian()
    importance = diagonal_blocks(H, 8) if blocks else H.diagonal()
    grid, start = search_grid(w, importance, scheme), min_max_grid(w, scheme)
    for row in range(8):
        for g in range(3):
            inside = slice(8 * g, 8 * g + 8)
            cost = H[inside, inside] if blocks else torch.diag(H.diagonal()[inside])
            first = float(start.scales[row, g]), float(start.zeros[row, g])
            found = float(grid.scales[row, g]), float(grid.zeros[row, g])
            tried = candidates(w[row, inside], scheme, first)
            _, least = oracles.best_grid(w[row, inside], cost, tried, grid.top)
            # the two sums run in different orders: 8 x 8 float64 products
            assert oracles.group_loss(w[row, inside], cost, *found, grid.top) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_search_is_never_worse_than_min_max(scheme):
    w, H = weight(6), hessian()
    group_size = scheme.columns(24)
    for importance, cost in (
        (H.diagonal(), torch.diag(H.diagonal())),
        (diagonal_blocks(H, group_size), torch.block_diag(*diagonal_blocks(H, group_size))),
    ):
        searched, plain = search_grid(w, importance, scheme), min_max_grid(w, scheme)
        for row in range(6):
            alone = [Grid(s[row : row + 1], z[row : row + 1], *rest) for s, z, *rest in (searched, plain)]
            # rounding of the float64 sums
            assert rounding_loss(w[row : row + 1], cost, alone[0]) <= rounding_loss(
                w[row : row + 1], cost, alone[1]
            ) * (1 + 1e-12)
        assert rounding_loss(w, cost, searched) < rounding_loss(w, cost, plain)


def test_refits_only_help(monkeypatch):
    w, H, scheme = weight(20), hessian(), Scheme(3, 8, True)
    fitted = rounding_loss(w, torch.diag(H.diagonal()), search_grid(w, H.diagonal(), scheme))
    monkeypatch.setattr(grid_search, "REFITS", 0)
    assert fitted < rounding_loss(w, torch.diag(H.diagonal()), search_grid(w, H.diagonal(), scheme))


def test_rows_are_searched_in_parts(monkeypatch):
    w, H, scheme = weight(7), hessian(), Scheme(4, 8, False)
    whole = search_grid(w, H.diagonal(), scheme)
    monkeypatch.setattr(grid_search, "CHUNK_WEIGHTS", 2 * 24)
    parts = search_grid(w, H.diagonal(), scheme)
    assert torch.equal(whole.scales, parts.scales)
    assert torch.equal(whole.zeros, parts.zeros)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("largest", [-4.0, 4.0])
def test_a_signed_scale_puts_the_largest_weight_on_code_0(bits, largest, monkeypatch):
    monkeypatch.setattr(grid_search, "REFITS", 0)
    w = torch.tensor([[0.1, largest, -0.3, 0.2]])
    importance = torch.tensor([1.0, 1e6, 1.0, 1.0])  # nothing but the largest weight counts
    grid = search_grid(w, importance, Scheme(bits, 4, True), shrinks=(1.0,))
    codes = nearest_codes(w, grid)
    assert float(grid.scales) == -largest / 2 ** (bits - 1)  # a power of two: exact in float16
    assert int(codes[0, 1]) == 0
    assert float(values(codes, grid)[0, 1]) == largest


def test_searched_scales_are_exact_in_the_export_dtype():
    grid = search_grid(weight(), hessian().diagonal(), SCHEMES[0], scale_dtype=torch.bfloat16)
    assert torch.equal(grid.scales.bfloat16().double(), grid.scales)


def test_diagonal_blocks():
    H = hessian()
    blocks = diagonal_blocks(H, 8)
    assert blocks.shape == (3, 8, 8)
    assert torch.equal(torch.block_diag(*blocks), H * torch.block_diag(*[torch.ones(8, 8)] * 3))


@pytest.mark.parametrize("columns", [24, NARROWEST + 1, PANELS * NARROWEST + 40])
def test_quadratic_loss_is_the_mean_squared_output_error(columns):
    """Of one panel of columns, and of several that do not divide them."""
    x, error = oracles.correlated_inputs(40, columns), weight(6, columns)
    # 40 float64 products a column, summed in another order
    assert quadratic_loss(error, oracles.second_moment([x])) == pytest.approx(oracles.output_error(x, error), rel=1e-12)
