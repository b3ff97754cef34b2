"""AWQ's search. Oracle: output errors computed from the inputs themselves, token by token, in float64."""

import oracles
import pytest
import torch

from ptq.awq import search_clip, search_scales
from ptq.awq.solver import rescale, tie
from ptq.formats.codec import Scheme
from ptq.grid import min_max_grid, nearest_codes, values
from ptq.grid_search import COARSE, search_grid

K, T = 24, 60
SCHEME = Scheme(3, 8, True)


@pytest.fixture
def x():
    return oracles.correlated_inputs(T, K)


def search(x, weights, schemes=None, **options):
    magnitude = x.abs().mean(0)
    return search_scales(weights, oracles.second_moment([x]), magnitude, schemes or [SCHEME] * len(weights), **options)


def direct_loss(x, weight, s, scheme, clip):
    """Mean squared output error of rounding ``W s`` for inputs ``x / s``, token by token."""
    scaled, moved = weight * s, x / s
    if clip:
        h = moved.square().mean(0)
        grid = search_grid(scaled, h + 0.01 * h.mean(), scheme, shrinks=COARSE)
    else:
        grid = min_max_grid(scaled, scheme)
    quantized = oracles.dequantize(oracles.round_to_codes(scaled, *grid[:2], grid.top), *grid[:2])
    return oracles.output_error(moved, quantized - scaled)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_losses_from_the_hessian_are_those_of_the_outputs(symmetric, clip, x):
    weights = [oracles.random_weight(rows, K, rows) for rows in (6, 3)]
    schemes = [Scheme(3, 8, symmetric), Scheme(4, -1, symmetric)]
    found = search(x, weights, schemes, clip=clip)
    for s, loss in ((found.scales, found.loss), (torch.ones(K, dtype=torch.float64), found.identity_loss)):
        direct = sum(direct_loss(x, w, s, scheme, clip) for w, scheme in zip(weights, schemes, strict=True))
        assert loss == pytest.approx(direct, rel=1e-9)  # float64, in another order


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_scaling_is_never_worse_than_none(bits, seed):
    x = oracles.correlated_inputs(T, K, seed, outliers=2)
    found = search(x, [oracles.random_weight(16, K, seed)], [Scheme(bits, -1, True)], grid=5, clip=False)
    assert found.loss <= found.identity_loss
    assert bool((found.scales > 0).all())
    if found.loss == found.identity_loss:
        assert torch.equal(found.scales, torch.ones_like(found.scales))


def test_scaling_pays_where_one_input_is_strong():
    x = oracles.correlated_inputs(T, K, outliers=1)
    found = search(x, [oracles.random_weight(16, K)], [Scheme(3, -1, True)], clip=False)
    assert found.loss < 0.7 * found.identity_loss  # measured 0.4: the strong channel gets the finer steps
    assert int(found.scales.argmax()) == int(x.abs().mean(0).argmax())


def test_no_scaling_is_among_the_candidates_where_nothing_helps():
    """Weights that the grid holds exactly: any scaling but none loses something."""
    weight = torch.randint(-4, 4, (8, K), generator=torch.Generator().manual_seed(0)).double()
    weight[:, ::8] = -4.0
    x = torch.eye(K, dtype=torch.float64)
    x[::2] *= 3
    found = search(x, [weight], clip=True)
    assert (found.loss, found.identity_loss) == (0, 0)
    assert torch.equal(found.scales, torch.ones(K, dtype=torch.float64))


def test_inputs_that_never_fire_get_a_finite_scale(x):
    x[:, 3:6] = 0
    found = search(x, [oracles.random_weight(16, K)], [Scheme(3, -1, True)], clip=False)
    assert bool(torch.isfinite(found.scales).all())
    assert bool((found.scales > 0).all())


def test_rescale_is_the_moment_of_scaled_inputs(x):
    s = torch.rand(K, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    torch.testing.assert_close(
        rescale(oracles.second_moment([x]), s), oracles.second_moment([x / s]), rtol=1e-12, atol=1e-14
    )


def test_tied_channels_get_the_largest_of_their_scales(x):
    s = torch.tensor([1.0, 5.0, 3.0, 2.0])
    assert tie(s, None) is s
    assert tie(s, torch.tensor([0, 2, 0, 2])).tolist() == [3, 5, 3, 5]
    tied = torch.arange(K) % 8
    found = search(x, [oracles.random_weight(16, K)], [Scheme(3, -1, True)], clip=False, tied=tied).scales
    assert len(found.unique()) > 1
    assert torch.equal(found[:8].repeat(3), found)


@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_minimises_each_groups_part_of_the_output_error(symmetric, x):
    weight, scheme = oracles.random_weight(6, K), Scheme(3, 8, symmetric)
    clipped = search_clip(weight, oracles.second_moment([x]), scheme)
    plain = min_max_grid(weight, scheme)
    errors = [values(nearest_codes(weight, grid), grid) - weight for grid in (clipped, plain)]
    gain = 0.0
    for g in range(3):
        inside = slice(8 * g, 8 * g + 8)
        for row in range(6):
            ours, range_only = (oracles.output_error(x[:, inside], d[row : row + 1, inside]) for d in errors)
            assert ours <= range_only * (1 + 1e-9)
            first, found = ((float(grid.scales[row, g]), float(grid.zeros[row, g])) for grid in (plain, clipped))
            blockwise = oracles.group_loss(
                weight[row, inside], oracles.second_moment([x[:, inside]]), *found, clipped.top
            )
            assert blockwise == pytest.approx(ours, rel=1e-9)
            gain += range_only - ours
            assert ours < range_only or first == found
    assert gain > 0
