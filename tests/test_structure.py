"""Which modules are Linears. Oracle: ``nn.functional.linear`` by construction of each class."""

import pytest
import torch
from torch import nn

from ptq.models.structure import linears

# A Linear with a forward of its own -> whether it is the product alone.
FORWARDS = {
    "matmul": (lambda self, x: x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias, True),
    "under another name": (lambda self, x: nn.functional.linear(x, self.weight, self.bias) * self.one, True),
    "scaled": (lambda self, x: nn.functional.linear(x, self.weight, self.bias) * self.half, False),
    "clipped": (lambda self, x: nn.functional.linear(x.clamp(-1e4, 1e4), self.weight, self.bias), False),
    "in place": (lambda self, x: nn.functional.linear(x.mul_(0.5), self.weight, self.bias), False),
    "rounded": (lambda self, x: nn.functional.linear((x * 64).round() / 64, self.weight, self.bias), False),
    "in float32": (lambda self, x: nn.functional.linear(x.float(), self.weight.float()), False),
    "dropout": (lambda self, x: nn.functional.dropout(nn.functional.linear(x, self.weight, self.bias)), False),
    "two results": (lambda self, x: (nn.functional.linear(x, self.weight, self.bias), x), False),
    "other shape": (lambda self, x: nn.functional.linear(x, self.weight, self.bias).flatten(), False),
    "more arguments": (lambda self, x, route: nn.functional.linear(x, self.weight, self.bias), False),
    "something else": (lambda self, x: nn.functional.linear(x, self.weight, self.bias) + self.shift, False),
    "an error": (lambda self, x: 1 / 0, False),
}


def build(forward, bias=True, **where):
    made = type("Own", (nn.Linear,), {"forward": forward})(12, 10, bias=bias, **where)
    made.one, made.half, made.notes = 1.0, 0.5, []
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", FORWARDS)
def test_a_forward_of_its_own_is_tried(name, bias):
    forward, product = FORWARDS[name]
    made = build(forward, bias)
    before, random = {key: value.clone() for key, value in made.state_dict().items()}, torch.get_rng_state()
    assert [path for path, _ in linears(nn.Sequential(made))] == ["0"] * product
    assert all(torch.equal(made.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(torch.get_rng_state(), random)


def test_where_and_in_what_it_is_does_not_matter():
    forward, _ = FORWARDS["matmul"]
    assert dict(linears(build(forward, device="meta", dtype=torch.bfloat16)))
    with torch.device("meta"), torch.inference_mode():
        assert dict(linears(build(forward)))


def test_what_holds_more_than_a_matrix_of_floats_is_not_tried():
    ran = []

    def note(self, x):
        ran.append(x)
        return nn.functional.linear(x, self.weight, self.bias)

    assert dict(linears(build(note)))
    ran.clear()
    with_buffer, with_child, with_parameter, quantized, bytes_ = (build(note) for _ in range(5))
    with_buffer.register_buffer("scale", torch.ones(1))
    with_child.more = nn.Linear(12, 10)
    with_parameter.scale = nn.Parameter(torch.ones(1))
    quantized.weight = nn.Parameter(torch.zeros(10, 12, dtype=torch.float8_e4m3fn), requires_grad=False)
    bytes_.weight = nn.Parameter(torch.zeros(10, 12, dtype=torch.int8), requires_grad=False)
    for one in (with_buffer, with_child, with_parameter, quantized, bytes_):
        assert "" not in dict(linears(one))
    assert not ran
