"""What groups lose on several grids, by the C++ libraries. Oracle: the definition in float64."""

from collections.abc import Iterator

import pytest
import torch
from cpu_libraries import current_libraries, the_only_one
from ptq_kernels.cpu import grids, library
from torch import Tensor

from ptq.formats.codec import Scheme
from ptq.grid import Grid, nearest_codes, values
from ptq.grid_search import search_grid

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [(1, 1, 128), (3, 5, 32), (70, 2, 60), (9, 4, 1), (33, 3, 17), (2, 1, 1000), (0, 2, 16)]


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    yield from current_libraries(tmp_path_factory)


@pytest.fixture(params=tuple(library.SETS))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return the_only_one(request.param, monkeypatch)


def problem(shape: tuple[int, int, int], top: int = 7, count: int = 4) -> tuple[grids.Groups, Tensor, Tensor]:
    """A weight, costs of which some are 0, and grids with scales of either sign."""
    generator = torch.Generator().manual_seed(sum(shape))
    n, groups, size = shape
    weight = torch.randn(shape, generator=generator)
    cost = (torch.rand(groups, size, generator=generator) - 0.1).clamp(min=0)
    scales = torch.randn(count, n, groups, generator=generator)
    scales = scales.sign() * (scales.abs() + 0.05)
    zeros = torch.randint(0, top + 1, (count, n, groups), generator=generator).float()
    return grids.Groups(weight, cost, top), scales, zeros


def from_zero(weight: Tensor, scales: Tensor, zeros: Tensor, top: int) -> Tensor:
    """Codes minus the zero point, float64. The quotient is a float32, as the solvers' is: others round elsewhere."""
    codes = (weight / scales.unsqueeze(-1)).double().round() + zeros.double().unsqueeze(-1)
    return codes.clamp(0, top) - zeros.double().unsqueeze(-1)


@pytest.mark.parametrize("top", [3, 255])
@pytest.mark.parametrize("shape", SHAPES)
def test_losses(isa: str, shape: tuple[int, int, int], top: int) -> None:
    groups, scales, zeros = problem(shape, top)
    error = from_zero(groups.weight, scales, zeros, top) * scales.double().unsqueeze(-1) - groups.weight.double()
    found = grids.losses(groups, scales, zeros)
    assert found.shape == scales.shape
    # up to 1000 float32 squares are added up; an error that is small beside the weight is known to 2**-23 of that
    torch.testing.assert_close(found.double(), (error.square() * groups.cost.double()).sum(-1), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_moments(isa: str, shape: tuple[int, int, int]) -> None:
    groups, scales, zeros = problem(shape)
    c, cost = from_zero(groups.weight, scales[0], zeros[0], 7), groups.cost.double()
    squares, products = grids.moments(groups, scales[0], zeros[0])
    # up to 1000 float32 terms of one sign in lanes of 4 or more: 250 roundings of 2**-24 to either side
    torch.testing.assert_close(squares.double(), (c.square() * cost).sum(-1), rtol=1e-5, atol=0)
    allowed = 1e-5 * (c * groups.weight.double() * cost).abs().sum(-1)  # terms of either sign
    assert ((products.double() - (c * groups.weight.double() * cost).sum(-1)).abs() <= allowed).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("shape", "group"), [((40, 256), 128), ((7, 180), 60), ((5, 96), -1)])
def test_a_search_finds_as_good_a_grid_as_with_torch(
    isa: str, shape: tuple[int, int], group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, importance = torch.randn(shape, generator=generator), torch.rand(shape[1], generator=generator)
    scheme = Scheme(3, group, symmetric)

    def loss(grid: Grid) -> Tensor:
        error = values(nearest_codes(weight, grid), grid).double() - weight.double()
        return (error.square() * importance.double()).view(shape[0], grid.scales.shape[1], -1).sum(-1)

    weight.requires_grad_()  # as that of a Linear, where gradients are not switched off
    ours = search_grid(weight, importance, scheme)
    monkeypatch.setattr(library, "best", lambda: None)
    theirs = search_grid(weight, importance, scheme)
    torch.testing.assert_close(loss(ours), loss(theirs), rtol=1e-5, atol=0)
    assert float((ours.scales == theirs.scales).float().mean()) > 0.9  # others are as good, up to the order of sums


def test_what_the_library_is_given(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, scales, zeros = problem((3, 5, 32))
    assert grids.serves(groups)
    assert not grids.serves(groups._replace(weight=groups.weight.double()))
    assert not grids.serves(groups._replace(weight=groups.weight.mT))
    assert not grids.serves(groups._replace(cost=groups.cost.to("meta")))
    apart = torch.stack([scales, scales], -1)[..., 0]
    assert torch.equal(grids.losses(groups, apart, zeros), grids.losses(groups, scales, zeros))
    for wrong in (
        lambda: grids.losses(groups, scales, zeros[:2]),
        lambda: grids.losses(groups, scales[:, :2], zeros[:, :2]),
        lambda: grids.losses(groups, scales.double(), zeros.double()),
        lambda: grids.moments(groups, scales, zeros),
        lambda: grids.moments(groups._replace(cost=groups.cost[:2]), scales[0], zeros[0]),
    ):
        with pytest.raises(AssertionError):
            wrong()
    monkeypatch.setattr(library, "best", lambda: None)
    assert not grids.serves(groups)
