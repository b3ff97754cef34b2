"""Derivatives of any order and mode through ptq_kernels.matmul, against the dense float64 function."""

import ptq_kernels
import pytest
import torch
from packed_weights import Case, dense_float64, random_case
from torch import Tensor
from torch.autograd import forward_ad

K, N = 64, 32
# Float32 sums of 64 products, through tanh and up to two derivatives of it, of the largest value.
ROUNDING = 3e-5
CASES = {"symmetric": random_case(N, K, 32), "zeros": random_case(N, K, 32, 3, symmetric=False)}
GENERATOR = torch.Generator().manual_seed(0)
X, TANGENT = torch.randn(2, 3, K, generator=GENERATOR), torch.randn(2, 3, K, generator=GENERATOR)
BIAS, BIAS_TANGENT = torch.randn(N, generator=GENERATOR), torch.randn(N, generator=GENERATOR)
PERM = torch.randperm(K, generator=GENERATOR).int()


def packed(case: Case, prepared: bool, perm: Tensor | None, activation: str | None = None):
    qweight, layout = case.qweight, "canonical"
    if prepared:
        ready = ptq_kernels.prepare(*case.tensors, **case.sized)
        qweight, layout = ready.qweight, ready.layout

    def linear(x: Tensor, bias: Tensor | None = None) -> Tensor:
        rest = {"layout": layout, "perm": perm, "activation": activation, "impl": "reference" if activation else "auto"}
        return ptq_kernels.matmul(x, qweight, case.scales, case.zeros, bias, **case.scheme, **rest)

    return linear


def dense(case: Case, perm: Tensor | None):
    weight = dense_float64(case)

    def linear(x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = (x if perm is None else x[..., perm.long()]).to(weight.dtype) @ weight.T
        return y if bias is None else y + bias

    return linear


def scalar(linear):
    """A function with derivatives of every order, of x and the bias."""
    return lambda x, bias: linear(x, bias).tanh().square().sum()


def penalty(linear, x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Gradients of the size of a gradient, as gradient penalties take them."""
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    (grad,) = torch.autograd.grad(scalar(linear)(x, bias), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), (x, bias))


def dual(linear, x: Tensor, bias: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = linear(forward_ad.make_dual(x, TANGENT.to(x.dtype)), forward_ad.make_dual(bias, BIAS_TANGENT.to(x.dtype)))
        return forward_ad.unpack_dual(y).tangent


WAYS = {
    "grad": lambda f, x, b: torch.func.grad(scalar(f), (0, 1))(x, b),
    "vjp": lambda f, x, b: torch.func.vjp(f, x, b)[1](torch.ones(2, 3, N, dtype=x.dtype)),
    "jvp": lambda f, x, b: torch.func.jvp(f, (x, b), (TANGENT.to(x.dtype), BIAS_TANGENT.to(x.dtype))),
    "jvp of x": lambda f, x, b: torch.func.jvp(lambda x: f(x, b), (x,), (TANGENT.to(x.dtype),)),
    "jvp of the bias": lambda f, x, b: torch.func.jvp(lambda b: f(x, b), (b,), (BIAS_TANGENT.to(x.dtype),)),
    "jvp without a bias": lambda f, x, b: torch.func.jvp(f, (x,), (TANGENT.to(x.dtype),)),
    "dual numbers": dual,
    "forward over reverse": lambda f, x, b: torch.func.hessian(scalar(f))(x[0, 0], b),
    "reverse over reverse": lambda f, x, b: torch.func.jacrev(torch.func.grad(scalar(f)))(x[0, 0], b),
    "reverse over forward": lambda f, x, b: torch.func.grad(lambda x: torch.func.jvp(
        lambda b: scalar(f)(x, b), (b,), (BIAS_TANGENT.to(x.dtype),))[1])(x),
    "forward over forward": lambda f, x, b: torch.func.jacfwd(torch.func.jacfwd(scalar(f)))(x[0, 0], b),
    "vmap": lambda f, x, b: torch.func.vmap(f, (1, None), 1)(x, b),
    "vmap with biases": lambda f, x, b: torch.func.vmap(f)(x, torch.stack([b, 2 * b])),
    "vmap of biases": lambda f, x, b: torch.func.vmap(f, (None, 0))(x, torch.stack([b, 2 * b])),
    "gradients for each row": lambda f, x, b: torch.func.vmap(torch.func.grad(scalar(f)), (0, None))(x[0], b),
    "gradient of a gradient": penalty,
}  # fmt: skip


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("case", "perm"), [("symmetric", None), ("zeros", None), ("symmetric", PERM)])
@pytest.mark.parametrize("way", WAYS)
def test_agrees_with_the_dense_function(way: str, case: str, perm: Tensor | None, prepared: bool) -> None:
    got = WAYS[way](packed(CASES[case], prepared, perm), X, BIAS)
    want = WAYS[way](dense(CASES[case], perm), X.double(), BIAS.double())
    got, want = (list(each) if isinstance(each, tuple) else [each] for each in (got, want))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        assert one.abs().max() > 0
        torch.testing.assert_close(one.double(), other, rtol=0, atol=ROUNDING * float(other.abs().max()))


def test_rounded_rows_have_the_derivatives_of_unrounded_ones() -> None:
    rounded, exact = packed(CASES["symmetric"], False, None, "int8"), packed(CASES["symmetric"], False, None)
    (y, tangent), (plain, want) = (torch.func.jvp(each, (X,), (TANGENT,)) for each in (rounded, exact))
    assert not torch.equal(y, plain)
    assert torch.equal(tangent, want)
    assert torch.equal(torch.func.grad(lambda x: rounded(x).sum())(X), torch.func.grad(lambda x: exact(x).sum())(X))


def test_a_stack_of_weights_is_served_one_after_the_other() -> None:
    cases = [random_case(N, K, 32), random_case(N, K, 32, 4, dtype=torch.float32)]
    cases[1] = cases[1]._replace(qweight=cases[1].qweight.flip(0), codes=cases[1].codes.flip(0))
    stack = torch.stack([each.qweight for each in cases])

    def call(qweight: Tensor) -> Tensor:
        return ptq_kernels.matmul(X, qweight, cases[0].scales, **cases[0].scheme)

    want = torch.stack([packed(each, False, None)(X) for each in cases])
    assert torch.equal(torch.func.vmap(call)(stack), want)
    assert not torch.equal(want[0], want[1])


@pytest.mark.parametrize("way", ["vmap", "vmap with biases", "vmap of biases", "jvp", "forward over forward"])
def test_compiled_transforms(way: str) -> None:
    linear, double = packed(CASES["symmetric"], False, None), dense(CASES["symmetric"], None)

    def transform(x: Tensor, bias: Tensor):
        return WAYS[way](linear, x, bias)

    got, want = torch.compile(transform, backend="eager")(X, BIAS), WAYS[way](double, X.double(), BIAS.double())
    got, want = (each if isinstance(each, tuple) else (each,) for each in (got, want))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=ROUNDING * float(other.abs().max()))
    torch._dynamo.reset()  # which has put the function down as one to leave alone
    whole = torch.compile(transform, backend="eager", fullgraph=True)
    if way.startswith("vmap"):
        assert torch.equal(whole(X, BIAS), got[0])
    else:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="outside of torch.compile"):
            whole(X, BIAS)
