"""topk_kd_loss under torch's machinery (gradcheck, opcheck, torch.compile), what it refuses, and the module."""

import re

import pytest
import torch
from torch.library import opcheck

from fasttransfer import TopKKDLoss, topk_kd_loss
from tests.test_kd_compile import BACKENDS

OPS = torch.ops.fasttransfer
TAILS = ("renormalize", "zero", "bucket")
pytestmark = [
    pytest.mark.usefixtures("one_backend"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),  # torch's own, in its compiler
]


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def batch(rows=3, columns=10, k=4, dtype=torch.float32):
    values, indices = torch.randn(rows, columns).log_softmax(-1).topk(k)
    return torch.randn(rows, columns).to(dtype), values, indices


@pytest.mark.parametrize("tail", TAILS)
def test_gradcheck(tail):
    s, values, indices = batch(dtype=torch.float64)
    temperature = 1.7 if tail == "renormalize" else 1.0
    options = {"tail": tail, "teacher_form": "log_probs", "temperature": temperature}
    labels = torch.tensor([int(indices[0, 0]), -100, 9])
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: topk_kd_loss(x, values, indices, **options), s)
    assert torch.autograd.gradcheck(
        lambda x: topk_kd_loss(
            x, values, indices, labels, label_weight=0.3, label_smoothing=0.2, reduction="none", **options
        ),
        s,
    )


def op_arguments(dtype, per_row, reduction, tail):
    s, values, indices = batch(6, 12, dtype=dtype)
    s, values, indices = s.reshape(2, 3, 12), values.reshape(2, 3, 4), indices.reshape(2, 3, 4).clamp_max(7)
    if not per_row:
        return (
            s,
            values,
            indices,
            None,
            None,
            None,
            None,
            [],
            1.0,
            0.0,
            0.0,
            -100,
            False,
            8,
            reduction,
            True,
            tail,
        )
    labels = torch.randint(8, (2, 3))
    labels[0, 0] = -100
    tensors = labels, torch.rand(2, 3), 1 + torch.rand(2, 3), torch.tensor([5.0, 4.0])
    return (s, values, indices.int(), *tensors, [], 1.0, 0.3, 0.1, -100, True, 8, reduction, True, tail)


@pytest.mark.parametrize(
    "case",
    [(torch.float32, False, "mean", "bucket"), (torch.float16, True, "none", "renormalize"),
     (torch.float64, True, "mean", "zero")],
    ids=str,
)  # fmt: skip
def test_opcheck(case):
    for want_grad in (True, False):
        opcheck(OPS.topk_kd.default, (*op_arguments(*case), want_grad))
    opcheck(OPS.topk_kd_.default, op_arguments(*case))


class Student(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.head = torch.nn.Linear(8, 40)
        self.criterion = TopKKDLoss(**options)

    def forward(self, x, *teacher, **tensors):
        return self.criterion(self.head(x), *teacher, **tensors)


@pytest.mark.parametrize("compiler", BACKENDS)
def test_compile_fullgraph(fresh_compiler, compiler):
    model = Student(label_weight=0.3, tail="bucket", teacher_form="log_probs", inplace=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=compiler == "aot_eager", backend=compiler)
    for rows in (4, 7):
        _, values, indices = batch(rows, 40, 5)
        x, labels = torch.randn(rows, 8), torch.randint(40, (rows,))
        results = []
        for function in (model, compiled):
            model.zero_grad()
            loss = function(x, values, indices, labels)
            loss.backward()
            results.append((loss.detach(), model.head.weight.grad.clone()))
        for other, expected in zip(*reversed(results), strict=True):
            torch.testing.assert_close(other, expected)


def test_backward_twice_and_double_backward():
    s, values, indices = batch()
    s.requires_grad_()
    loss = topk_kd_loss(s, values, indices) * 3
    (first,) = torch.autograd.grad(loss, s, retain_graph=True)
    (second,) = torch.autograd.grad(loss, s, retain_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, s, create_graph=True)


def test_inplace_refuses_what_it_cannot_overwrite():
    s, values, indices = batch(3, 10, 10)
    s.requires_grad_()
    with pytest.raises(ValueError, match="leaf"):
        topk_kd_loss(s, values, indices, inplace=True)
    logits = s * 1
    with pytest.raises(ValueError, match="teacher_values shares its memory"):
        topk_kd_loss(logits, logits.detach(), indices, inplace=True)
    loss = topk_kd_loss(logits, values, indices, inplace=True)
    with pytest.raises(RuntimeError, match=r"used again|modified by an inplace"):
        (loss + logits.sum()).backward()


S, VALUES, INDICES = torch.zeros(3, 9), torch.full((3, 2), -1.0), torch.tensor([[0, 1], [2, 8], [5, -1]])
LOG = {"teacher_form": "log_probs"}
REFUSED = {
    "values of integers": (TypeError, "teacher_values must be float32", {"teacher_values": INDICES}),
    "values are a list": (TypeError, "teacher_values must be a tensor", {"teacher_values": [[0.0]]}),
    "indices of floats": (TypeError, "teacher_indices must be int32 or int64, got fl", {"teacher_indices": VALUES}),
    "indices in 16 bits": (
        TypeError,
        "teacher_indices .* got uint16",
        {"teacher_indices": INDICES.to(torch.uint16)},
    ),
    "k differs": (ValueError, r"\[3, 2\] and \[3, 1\]", {"teacher_indices": INDICES[:, :1]}),
    "rows differ": (ValueError, "leading dimensions", {"student_logits": S[:2]}),
    "k is 0": (ValueError, "k >= 1", {"teacher_values": VALUES[:, :0], "teacher_indices": INDICES[:, :0]}),
    "index too large": (ValueError, r"in \[0, 8\).* got 8 at index \[1, 1\]", {"vocab_size": 8}),
    "index below -1": (ValueError, r"got -2 at index \[0, 1\]", {"teacher_indices": INDICES - torch.tensor([0, 3])}),
    "vocab_size": (ValueError, "between 2 and 9", {"vocab_size": 10}),
    "one column": (ValueError, "at least 2, got 1", {"vocab_size": 1}),
    "form": (ValueError, "teacher_form must be one of 'logits', 'log_probs', got 'probs'", {"teacher_form": "probs"}),
    "tail": (ValueError, "tail must be one of .*, got 'drop'", {"tail": "drop"}),
    "mass of logits": (ValueError, "tail='zero' needs teacher_form='log_probs'", {"tail": "zero"}),
    "mass at another temperature": (
        ValueError,
        "tail='bucket' needs the number temperature=1, got 2",
        {"tail": "bucket", "temperature": 2.0, **LOG},
    ),
    "mass at a temperature per row": (
        ValueError,
        "temperature=1, got one per row",
        {"tail": "bucket", "temperature": torch.ones(3), **LOG},
    ),
    "positive log-probabilities": (
        ValueError,
        r"at most 0 .*got 2 at index \[1, 0\]: are these logits",
        {"teacher_values": torch.tensor([[0.0, -1.0], [2.0, 0.0], [-1.0, 5.0]]), **LOG},
    ),
    "teacher with a gradient": (
        ValueError,
        "teacher_values requires grad.*constant",
        {"teacher_values": VALUES.clone().requires_grad_()},
    ),
    "labels without weight": (ValueError, "label_weight", {"labels": torch.tensor([0, 1, 2])}),
    "temperature": (ValueError, "temperature must be", {"temperature": 0.0}),
    "one row": (
        ValueError,
        "batchmean",
        {"student_logits": S[0], "teacher_values": VALUES[0], "teacher_indices": INDICES[0], "reduction": "batchmean"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    error, message, changes = REFUSED[name]
    call = {"student_logits": S, "teacher_values": VALUES, "teacher_indices": INDICES}
    topk_kd_loss(**call)
    with pytest.raises(error, match=message):
        topk_kd_loss(**(call | changes))


def test_module():
    s, values, indices = batch()
    options = {"teacher_form": "log_probs", "tail": "bucket", "label_weight": 0.5, "reduction": "sum"}
    module = TopKKDLoss(**options)
    labels = torch.arange(3)
    assert torch.equal(
        module(s, values, indices, labels), topk_kd_loss(s, values, indices, labels, **options)
    )
    assert repr(module) == (
        "TopKKDLoss(teacher_form='log_probs', tail='bucket', temperature=1.0, label_weight=0.5, reduction='sum')"
    )
    warm = TopKKDLoss(temperature=2.0)
    expected = topk_kd_loss(s, values, indices, temperature=3.0)
    assert torch.equal(warm(s, values, indices, temperature=3.0), expected)
    for options, message in (
        ({"tail": "zero"}, "log_probs"),
        ({"tail": "bucket", "temperature": 2.0, **LOG}, "got 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            TopKKDLoss(**options)
