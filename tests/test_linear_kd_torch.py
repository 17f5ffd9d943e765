"""linear_kd_loss inside autograd, opcheck, torch.compile and autocast, and what it refuses."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from fasttransfer import LinearKDLoss, kd_loss, linear_kd_loss
from tests.linear_kd_calls import Sides, call, check, exact, sides
from tests.oracle import norm_error
from tests.test_kd_compile import BACKENDS as COMPILERS

OP = torch.ops.fasttransfer.linear_kd.default
pytestmark = [
    pytest.mark.usefixtures("one_backend"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script`"),
]


# ----------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "options", [{}, {"label_weight": 0.3}, {"divergence": "jsd", "standardize": True}], ids=str
)
def test_gradcheck(backend, reduction, options):
    given = sides(5, vocab=12, widths=(4, 3))
    labels = torch.tensor([3, -100, 0, 11, 2]) if "label_weight" in options else None

    def loss(hidden, head, bias):
        return call(
            Sides(hidden, head, bias, *given[3:]), labels, chunk_rows=2, reduction=reduction, **options
        )

    assert torch.autograd.gradcheck(loss, given[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_second_backward_is_not_scaled_twice(dtype, reduction):
    given = sides(5, dtype=dtype)
    loss = 3 * call(given, chunk_rows=2, reduction=reduction).sum()
    first = torch.autograd.grad(loss, given.trained(), retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()  # they are the caller's
    for more in (True, False):
        again = torch.autograd.grad(loss, given.trained(), retain_graph=more)
        assert all(torch.equal(x, y) for x, y in zip(again, kept, strict=True))
    for x, y in zip(kept, exact(given, upstream=3.0, reduction=reduction)[1], strict=True):
        assert norm_error(x, y) < 2e-2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_create_graph_is_a_clear_error(reduction):
    given = sides(3)
    with pytest.raises(RuntimeError, match=r"linear_kd_loss has no second derivative.*create_graph"):
        torch.autograd.grad(call(given, reduction=reduction).sum(), given.trained(), create_graph=True)


def test_tied_head_and_a_changed_head():
    """A head that is the embedding as well sums both gradients; one that changed before a second pass is noticed."""
    given = sides(4, dtype=torch.float32, bias=False)
    (plain,) = torch.autograd.grad(call(given), [given.student_head])
    (both,) = torch.autograd.grad(call(given) + given.student_head.sum(), [given.student_head])
    torch.testing.assert_close(both, plain + 1)
    loss = call(given, reduction="none").sum()
    with torch.no_grad():
        given.student_head.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    given = sides(6, dtype=torch.float32)
    expected = torch.autograd.grad(call(given), given.trained())
    loss = checkpoint(lambda *x: call(Sides(*x, *given[3:])), *given[:3], use_reentrant=reentrant)
    loss.backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(given.trained(), expected, strict=True))


def test_evaluation_records_nothing():
    given = sides(6, dtype=torch.float32)
    expected = call(given)
    with torch.no_grad():
        assert not call(given).requires_grad
    with torch.inference_mode():
        assert torch.equal(call(given), expected)
    teacher = [x.clone().requires_grad_() for x in given[3:]]
    with torch.no_grad():  # a teacher with parameters, where nothing is recorded
        assert torch.equal(call(Sides(*given[:3], *teacher)), expected)


# ----------------------------------------------------------------------------------------- opcheck, torch.compile


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_opcheck(dtype, per_row):
    tensors = [
        None if x is None else x.detach() for x in sides(2, 3, dtype=dtype, teacher_vocab=35, bias=per_row)
    ]
    rows = (None, None, None, None, [], 2.0, 0.0, 0.0, -100, False, 30, "mean", True)
    rest = ("forward_kl", [], False, [0.0, 0.0], False, 0, None)
    if per_row:
        labels = torch.tensor([[1, -100, 2], [0, 29, 5]])
        rows = (
            labels,
            torch.rand(2, 3),
            1 + torch.rand(2, 3),
            None,
            [],
            1.0,
            0.3,
            0.1,
            -100,
            True,
            30,
            "none",
            False,
        )
        rest = ("jsd", [0.5], False, [4.0, 0.0], True, 4, torch.float64)
    grads = (torch.float32, torch.float32, torch.float32 if per_row else None)
    opcheck(OP, (*tensors, *rows, *rest, *grads))
    opcheck(OP, (*tensors, *rows, *rest, None, None, None), test_utils=("test_schema", "test_faketensor"))


class Student(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 40)
        self.criterion = LinearKDLoss(chunk_rows=4, **options)

    def forward(self, x, teacher_hidden, teacher_head, labels=None):
        return self.criterion(
            torch.relu(self.body(x)), self.head.weight, teacher_hidden, teacher_head, labels,
            student_bias=self.head.bias,
        ).sum()  # fmt: skip


INDUCTOR = COMPILERS[1]


@pytest.mark.parametrize(
    "compiler, reduction",
    [
        ("aot_eager", "mean"),
        ("aot_eager", "none"),
        pytest.param(*INDUCTOR.values, "mean", marks=INDUCTOR.marks),
    ],
)
def test_compile_fullgraph(compiler, reduction):
    options = {"temperature": 2.0, "label_weight": 0.3} if reduction == "mean" else {"reduction": "none"}
    torch._dynamo.reset()
    model = Student(**options)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
    teacher_head = torch.randn(40, 5)
    for rows in (6, 9):
        labels = torch.randint(40, (rows,)) if "label_weight" in options else None
        args = torch.randn(rows, 8), torch.randn(rows, 5), teacher_head, labels
        results = []
        for run in (model, compiled):
            model.zero_grad()
            loss = run(*args)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        torch.testing.assert_close(*results)
    torch._dynamo.reset()


# --------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_f_linear_does(dtype, reduction):
    given = sides(6, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        loss = call(given, chunk_rows=4, reduction=reduction)
        logits = F.linear(*given[:3])
        assert logits.dtype == dtype
        expected = kd_loss(logits, F.linear(*given[3:]), reduction=reduction)
    grads = torch.autograd.grad(loss.sum() * 3, given.trained())
    assert all(x.dtype == torch.float32 for x in grads)
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=1e-4)
    for x, y in zip(grads, torch.autograd.grad(expected.sum() * 3, given.trained()), strict=True):
        assert norm_error(x, y) < 2e-2
    with torch.autocast("cpu", dtype):  # of float64 nothing is cast
        check(sides(6), chunk_rows=4, reduction=reduction)


def test_gradients_under_autocast_are_summed_in_fp32():
    given = sides(64, dtype=torch.float32, bias=False)
    rounded = Sides(
        *(None if x is None else x.detach().bfloat16().requires_grad_(x.requires_grad) for x in given)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = call(given, chunk_rows=4)
    (grad,) = torch.autograd.grad(loss, [given.student_head])
    (other,) = torch.autograd.grad(call(rounded, chunk_rows=4), [rounded.student_head])
    assert torch.equal(grad.bfloat16(), other)


# ------------------------------------------------------------------------------------------------ what is refused

Z = torch.zeros
REFUSED = {
    "hidden is a list": (TypeError, "student_hidden must be a tensor, got list", {"student_hidden": [1.0]}),
    "head of integers": (TypeError, "teacher_head must be float32", {"teacher_head": Z(9, 4).long()}),
    "head of another dtype": (
        TypeError, "student_head is torch.float64, student_hidden torch.float32", {"student_head": Z(9, 5).double()},
    ),
    "bias of another dtype": (TypeError, "teacher_bias is torch.float16", {"teacher_bias": Z(9).half()}),
    "widths": (ValueError, r"student_hidden must be .* got \[3, 5\] and \[9, 4\]", {"student_head": Z(9, 4)}),
    "head of one dimension": (ValueError, "student_hidden must be", {"student_head": Z(5)}),
    "no width": (ValueError, "H > 0", {"student_hidden": Z(3, 0), "student_head": Z(9, 0)}),
    "bias": (ValueError, r"student_bias must be \[V\] = \[9\], got \[8\]", {"student_bias": Z(8)}),
    "rows": (ValueError, r"leading dimensions, got \[3, 5\] and \[2, 4\]", {"teacher_hidden": Z(2, 4)}),
    "vocabularies": (
        ValueError, "student_head has 9 columns and teacher_head 12.*vocab_size=", {"teacher_head": Z(12, 4)},
    ),
    "vocab_size": (ValueError, "vocab_size must be between", {"vocab_size": 10}),
    "one column": (
        ValueError, "1 column", {"student_head": Z(1, 5), "teacher_head": Z(1, 4)},
    ),
    "head elsewhere": (ValueError, "student_head is on meta", {"student_head": Z(9, 5, device="meta")}),
    "teacher elsewhere": (
        ValueError, "teacher_hidden is on meta",
        {"teacher_hidden": Z(3, 4, device="meta"), "teacher_head": Z(9, 4, device="meta")},
    ),
    "teacher hidden": (
        ValueError, "teacher_hidden requires grad.*detach", {"teacher_hidden": Z(3, 4).requires_grad_()},
    ),
    "teacher head": (ValueError, "teacher_head requires grad", {"teacher_head": Z(9, 4).requires_grad_()}),
    "teacher bias": (ValueError, "teacher_bias requires grad", {"teacher_bias": Z(9).requires_grad_()}),
    "chunk_rows 0": (ValueError, "chunk_rows must be at least 1, got 0", {"chunk_rows": 0}),
    "chunk_rows 1.5": (TypeError, "chunk_rows must be an integer", {"chunk_rows": 1.5}),
    "accum_dtype a string": (TypeError, "accum_dtype must be a torch.dtype", {"accum_dtype": "fp32"}),
    "accum_dtype fp16": (ValueError, "accum_dtype must not be float16", {"accum_dtype": torch.float16}),
    "accum_dtype int": (ValueError, "accum_dtype must be bfloat16, float32", {"accum_dtype": torch.int32}),
    "accum_dtype narrow": (ValueError, "at least as wide as torch.float32", {"accum_dtype": torch.bfloat16}),
    "labels": (ValueError, r"labels must .* \[3\], got \[2\]", {"labels": Z(2).long(), "label_weight": 0.5}),
    "label range": (ValueError, r"labels must be in \[0, 9\)", {"labels": Z(3).long() + 9, "label_weight": 0.5}),
    "label_weight": (ValueError, "label_weight=0.5 was given without labels", {"label_weight": 0.5}),
    "row_weight": (ValueError, r"row_weight must .* \[3\]", {"row_weight": Z(4)}),
    "temperature": (ValueError, "temperature must be", {"temperature": 0.0}),
    "reduction": (ValueError, "reduction must be one of", {"reduction": "avg"}),
    "divergence": (ValueError, "divergence must be one of", {"divergence": "kl"}),
    "batchmean of one row": (
        ValueError, "reduction='batchmean'",
        {"student_hidden": Z(5), "teacher_hidden": Z(4), "reduction": "batchmean"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    error, message, changes = REFUSED[case]
    given = {"student_hidden": Z(3, 5, requires_grad=True), "student_head": Z(9, 5), "teacher_hidden": Z(3, 4),
             "teacher_head": Z(9, 4), **changes}  # fmt: skip
    for _ in range(2):
        with pytest.raises(error, match=re.compile(message, re.DOTALL)):
            linear_kd_loss(**given)


@pytest.mark.parametrize(
    "option", ["chunk_rows", "accum_dtype", "temperature", "reduction", "vocab_size", "softcap"]
)
def test_module_refuses_its_options_when_it_is_built(option):
    with pytest.raises((TypeError, ValueError), match=option):
        LinearKDLoss(**{option: object()})


def test_module_is_the_function():
    given = sides(5, dtype=torch.bfloat16)
    options = {"chunk_rows": 2, "accum_dtype": torch.bfloat16, "temperature": 3.0, "label_weight": 0.4}
    module = LinearKDLoss(**options)
    assert repr(module) == (
        "LinearKDLoss(temperature=3.0, label_weight=0.4, chunk_rows=2, accum_dtype=torch.bfloat16)"
    )
    labels = torch.arange(5)
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        loss = same(
            given.student_hidden, given.student_head, given.teacher_hidden, given.teacher_head, labels,
            student_bias=given.student_bias, teacher_bias=given.teacher_bias, row_weight=torch.ones(5),
        )  # fmt: skip
        assert torch.equal(loss, call(given, labels, **options))
