"""One block of columns in the C++ libraries. Oracle: the same loop in torch, in float64, which the solver's tests check
against the papers' algorithms."""

from functools import partial

import pytest
import torch
from cpu_libraries import current_libraries, the_only_one
from ptq_kernels.cpu import columns as kernels
from ptq_kernels.cpu import library
from torch import Tensor

from ptq.gptq import columns
from ptq.gptq.columns import Steps, descend_block, solve_block

pytestmark = pytest.mark.usefixtures("poisoned_memory")

GROUP = 16


@pytest.fixture(scope="module", autouse=True)
def libraries(tmp_path_factory: pytest.TempPathFactory):
    yield from current_libraries(tmp_path_factory)


@pytest.fixture(params=tuple(library.SETS))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return the_only_one(request.param, monkeypatch)


class Problem:
    """A block of a weight with `rows` rows whose columns are visited in a random order."""

    def __init__(self, rows: int, count: int, bits: int = 3, whole: int = 160) -> None:
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(rows * 1000 + count))
        self.start = 7 if count < whole - 7 else 0
        square = draw(count, whole).double() @ draw(whole, count).double() / whole
        self.factors = (0.1 * square @ square.t() + torch.eye(count)).float()
        self.weight, self.slopes = draw(count, rows), 0.3 * draw(count, rows)
        groups = -(-whole // GROUP)
        scales, zeros = 0.3 + 0.1 * draw(groups, rows).abs(), draw(groups, rows).mul(3).round().add(4).clamp(0, 7)
        order = torch.randperm(whole, generator=torch.Generator().manual_seed(1))
        self.steps = Steps(scales, zeros, (order // GROUP).int(), 2**bits - 1)
        self.codes = torch.full((count, rows), 99, dtype=torch.uint8)

    def in_float64(self) -> "Problem":
        other = Problem.__new__(Problem)
        for name in ("factors", "weight", "slopes"):
            setattr(other, name, getattr(self, name).double())
        scales, zeros, *rest = self.steps
        other.steps, other.start, other.codes = (
            Steps(scales.double(), zeros.double(), *rest),
            self.start,
            self.codes.clone(),
        )
        return other

    def values(self) -> Tensor:
        groups = self.steps.group[self.start : self.start + len(self.codes)].long()
        return (self.codes - self.steps.zeros[groups]) * self.steps.scales[groups]


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (1, 128), (7, 16), (32, 5), (33, 128), (100, 17), (257, 20)])
def test_gptq_within_a_block(isa: str, rows: int, count: int) -> None:
    ours = Problem(rows, count)
    naive = ours.in_float64()
    W, whole = ours.weight, torch.zeros(count, count + 9)
    whole[:, :count] = ours.factors  # a block of a larger matrix: rows lie further apart
    errors = solve_block(W, whole[:, :count], ours.steps, ours.start, ours.codes)
    expected = solve_block(naive.weight, naive.factors, naive.steps, naive.start, naive.codes)
    assert torch.equal(ours.codes, naive.codes)
    torch.testing.assert_close(errors.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(W, ours.values(), rtol=0, atol=0)
    assert count == 1 or len(ours.codes.unique()) > 1


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (1, 128), (7, 16), (32, 5), (33, 128), (100, 17), (257, 20)])
def test_descent_within_a_block(isa: str, rows: int, count: int) -> None:
    ours = Problem(rows, count)
    naive = ours.in_float64()
    before, slopes = ours.weight.clone(), ours.slopes.clone()
    moved = descend_block(ours.weight, ours.slopes, ours.factors, ours.steps, ours.start, ours.codes)
    expected = descend_block(naive.weight, naive.slopes, naive.factors, naive.steps, naive.start, naive.codes)
    assert torch.equal(ours.codes, naive.codes)
    torch.testing.assert_close(moved.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.weight, ours.values(), rtol=0, atol=0)
    torch.testing.assert_close(moved, ours.weight - before, rtol=0, atol=0)
    assert torch.equal(ours.slopes, slopes)


@pytest.mark.parametrize("bits", [2, 8])
def test_codes_stay_in_range(isa: str, bits: int) -> None:
    problem = Problem(40, 24, bits)
    problem.weight.mul_(1e6)  # far off the grid on both sides
    solve_block(problem.weight, problem.factors, problem.steps, problem.start, problem.codes)
    assert problem.codes.min() == 0
    assert problem.codes.max() == 2**bits - 1


def test_without_a_library_or_for_other_dtypes_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(8, 16)
    block = columns._columns(problem.factors, problem.steps, problem.start, problem.codes)
    assert kernels.serves(block, problem.weight) == (library.best() is not None)
    assert not kernels.serves(block, problem.weight.double())
    assert not kernels.serves(block, problem.weight.t())
    monkeypatch.setattr(library, "best", lambda: None)
    assert not kernels.serves(block, problem.weight)
    expected = problem.in_float64()
    solve_block(expected.weight, expected.factors, expected.steps, expected.start, expected.codes)
    solve_block(problem.weight, problem.factors, problem.steps, problem.start, problem.codes)
    assert torch.equal(problem.codes, expected.codes)


def test_the_library_is_given_only_what_fits(isa: str) -> None:
    problem = Problem(8, 16)
    block = columns._columns(problem.factors, problem.steps, problem.start, problem.codes)
    for wrong in (
        block._replace(group=block.group + 100),
        block._replace(codes=block.codes[:4]),
        block._replace(scales=block.scales[:, :4]),
        block._replace(factors=block.factors[:4]),
    ):
        with pytest.raises(AssertionError):
            kernels.solve(wrong, problem.weight, torch.empty_like(problem.weight))
