"""kd_loss under torch's machinery: opcheck, torch.compile, autocast, loss scaling.

One backend: what is tested is how the operations are declared, which is the same for all. The values are compared with
the eager call's, which the other files compare with the oracle on every backend.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from fasttransfer import KDLoss, kd_loss
from tests import oracle

OPS = torch.ops.fasttransfer
NO_COMPILER = None if shutil.which("g++") or shutil.which("clang++") else "inductor needs a C++ compiler"
BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))),
]

pytestmark = [
    pytest.mark.usefixtures("one_backend"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),  # torch's own, in its compiler
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------- opcheck


def op_arguments(dtype, teacher_dtype, per_row, reduction):
    """Positional arguments of torch.ops.fasttransfer.kd without the last (want_grad): numbers, or a value per row."""
    s, t = torch.randn(2, 3, 10).to(dtype), torch.randn(2, 3, 12).to(teacher_dtype)
    if not per_row:
        return (s, t, None, None, None, None, [], 2.0, 0.0, 0.0, -100, False, 8, reduction, True)
    labels = torch.randint(8, (2, 3))
    labels[0, 0] = -100
    tensors = labels, torch.rand(2, 3), 1 + torch.rand(2, 3), torch.tensor([5.0, 4.0])
    return (s, t, *tensors, [], 1.0, 0.3, 0.1, -100, True, 8, reduction, False)


CASES = [
    (torch.float32, torch.float32, False, "mean"),
    (torch.bfloat16, torch.float32, True, "mean"),
    (torch.float16, torch.bfloat16, True, "none"),
    (torch.float64, torch.float16, False, "none"),
]


@pytest.mark.parametrize("want_grad", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_kd(case, want_grad):
    opcheck(OPS.kd.default, (*op_arguments(*case), want_grad))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck_kd_inplace(case):
    opcheck(OPS.kd_.default, op_arguments(*case))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("op", [OPS.kd_scale.default, OPS.kd_scale_.default], ids=str)
def test_opcheck_kd_scale(op, dtype):
    grad = torch.randn(4, 10).to(dtype)
    value = torch.float64 if dtype == torch.float64 else torch.float32
    per_row = torch.rand(4) if dtype == torch.float16 else torch.empty(0)
    for upstream in (torch.tensor(2.0, dtype=value), torch.rand(4, dtype=value)):
        opcheck(op, (grad.clone(), upstream, per_row))


# ------------------------------------------------------------------------------------------------- torch.compile


class Student(torch.nn.Module):
    """A model whose loss is part of it, as trainers of language models have it."""

    def __init__(self, dtype=torch.float32, **options):
        super().__init__()
        self.body = torch.nn.Linear(8, 16)
        self.head = torch.nn.Linear(16, 40, bias=False, dtype=dtype)
        self.criterion = KDLoss(**options)

    def forward(self, x, teacher_logits, labels=None, **tensors):
        logits = self.head(torch.relu(self.body(x)).to(self.head.weight.dtype))
        return self.criterion(logits, teacher_logits, labels, **tensors)


def step(function, model, *args, **tensors):
    model.zero_grad()
    loss = function(*args, **tensors)
    loss.sum().backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def assert_same_step(compiled, model, *args, **tensors):
    loss, grads = step(model, model, *args, **tensors)
    other_loss, other_grads = step(compiled, model, *args, **tensors)
    torch.testing.assert_close(other_loss, loss)
    for other, grad in zip(other_grads, grads, strict=True):
        torch.testing.assert_close(other, grad)
        assert grad.any()


@pytest.mark.parametrize("compiler", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(compiler, dynamic):
    """Backward outside. Three batch sizes: with dynamic shapes no second compilation, without one more each."""
    model = Student(temperature=2.0, label_weight=0.3)
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=compiler)
    for rows in (4, 7, 12):
        labels = torch.randint(40, (rows,))
        labels[0] = -100
        assert_same_step(compiled, model, torch.randn(rows, 8), torch.randn(rows, 40), labels)
    if dynamic:
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(torch.randn(9, 8), torch.randn(9, 40), torch.randint(40, (9,)))


COMPILED_OPTIONS = {
    "plain": ({}, {}),
    "no labels read": ({"label_weight": 0.0, "reduction": "batchmean"}, {}),
    "distill": ({"label_weight": 0.5, "ignored_rows": "distill", "label_smoothing": 0.1}, {}),
    "per row": (
        {"reduction": "none"},
        {"temperature": torch.linspace(1, 3, 5), "row_weight": torch.arange(5)},
    ),
    "num_items": ({}, {"num_items": torch.tensor(17)}),
    "num_items, a number": ({}, {"num_items": 17}),
    "vocab_size": ({"vocab_size": 30}, {}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", COMPILED_OPTIONS)
def test_compile_options(case, dtype):
    options, tensors = COMPILED_OPTIONS[case]
    model = Student(dtype, **options)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    labels = torch.randint(30, (5,)) if "label_weight" in options else None
    assert_same_step(compiled, model, torch.randn(5, 8), torch.randn(5, 40), labels, **tensors)


def test_compile_evaluation():
    s, t = torch.randn(5, 40), torch.randn(5, 40)
    compiled = torch.compile(kd_loss, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(s, t, temperature=2.0), kd_loss(s, t, temperature=2.0))


def test_compile_inplace():
    """Compiled, in place gives the same numbers; whether memory is reused is then the compiler's decision."""
    model = Student(temperature=2.0, inplace=True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    plain = Student(temperature=2.0)
    plain.load_state_dict(model.state_dict())
    x, t = torch.randn(5, 8), torch.randn(5, 40)
    loss, grads = step(compiled, model, x, t)
    expected, expected_grads = step(plain, plain, x, t)
    torch.testing.assert_close(loss, expected)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other)


def test_compiled_errors_are_the_eager_ones():
    compiled = torch.compile(kd_loss, backend="aot_eager")
    with pytest.raises(ValueError, match="student_logits has 9 columns and teacher_logits 12"):
        compiled(torch.randn(3, 9), torch.randn(3, 12))


def test_second_backward_under_compile_is_right_or_an_error():
    """Never silently scaled twice."""
    leaf, t = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
    loss = torch.compile(lambda x: 3 * kd_loss(x, t), fullgraph=True, backend="aot_eager")(leaf)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    try:
        (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    except RuntimeError as error:
        assert "donated buffer" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(second, kept)
    assert torch.equal(first, kept)


def test_meta_tensors():
    """Shapes without values, as for planning memory."""
    s, t = (torch.randn(3, 5, 40, device="meta", dtype=torch.bfloat16) for _ in range(2))
    labels = torch.zeros(3, 5, dtype=torch.int64, device="meta")
    leaf = s.requires_grad_()
    loss = kd_loss(leaf, t, labels, label_weight=0.5, reduction="none")
    assert (loss.shape, loss.dtype, loss.device.type) == ((3, 5), torch.float32, "meta")
    loss.sum().backward()
    assert (leaf.grad.shape, leaf.grad.dtype) == (s.shape, torch.bfloat16)


# ------------------------------------------------------------------------------------------ autocast, loss scaling


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """The logits come out of the model in 16 bits and are read as they are; the loss is float32."""
    model, t = Student(temperature=2.0), torch.randn(5, 40)
    x = torch.randn(5, 8)
    seen = []
    model.head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits))
    with torch.autocast("cpu", dtype=dtype):
        loss = model(x, t)
    assert seen[0].dtype == dtype
    assert loss.dtype == torch.float32
    exact, _ = oracle.kd(seen[0], t, temperature=2.0)
    oracle.assert_norm_close(loss, exact)
    loss.backward()
    full_loss, full_grads = step(Student.forward.__get__(model), model, x, t)
    torch.testing.assert_close(loss.detach(), full_loss, rtol=0.05, atol=0)
    assert all(grad.isfinite().all() for grad in full_grads)


VOCABULARY = 128_256  # Llama 3's: a gradient element is 1/V, below fp16's normal numbers
ROWS = 8192  # of a batch, of which 4 are computed here: num_items divides by all


@pytest.mark.parametrize("inplace", [False, True])
def test_amp_step_in_fp16_with_a_large_vocabulary(inplace):
    """A mean over 8192 x 128256 in fp16: rounded before the loss scale, every gradient element would be 0."""
    torch.manual_seed(1)
    weight = torch.randn(VOCABULARY, 8)
    x, t, labels = torch.randn(4, 8), torch.randn(4, VOCABULARY), torch.randint(VOCABULARY, (4,))
    options = {"label_weight": 0.3, "temperature": 2.0, "num_items": ROWS}
    head = torch.nn.Linear(8, VOCABULARY, bias=False)
    head.weight.data.copy_(weight)
    optimizer = torch.optim.SGD(head.parameters(), lr=1e4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)

    with torch.autocast("cpu", dtype=torch.float16):
        logits = head(x)
        assert logits.dtype == torch.float16
        values, arrived = logits.detach().clone(), []
        logits.register_hook(lambda grad: arrived.append(grad.clone()))
        loss = kd_loss(logits, t, labels, inplace=inplace, **options)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**16, "the step was skipped"

    exact_loss, exact = oracle.kd(values, t, labels, **options)
    oracle.assert_norm_close(loss, exact_loss)
    assert (exact.half() == 0).float().mean() > 0.99, "the test shows nothing: fp16 could hold the gradient"
    if not inplace:  # a hook on logits that are then overwritten belongs to what they became
        assert arrived[0].dtype == torch.float16
        oracle.assert_norm_close(arrived[0], exact * 2.0**16)

    # The same step in float32 from the same logits: what differs is the rounding of the gradient and of head's
    # backward, both to fp16.
    moved = weight - head.weight.detach()
    expected = 1e4 * exact.T @ x.double()
    error = (moved.double() - expected).norm() / expected.norm()
    assert error <= 4 * oracle.TOLERANCES[torch.float16].roundoff


def test_amp_overflow_skips_the_step():
    """A loss scale that is too large must show as inf, which is what GradScaler looks for."""
    head = torch.nn.Linear(8, 50, bias=False)
    before = head.weight.detach().clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = kd_loss(head(torch.randn(4, 8)), torch.randn(4, 50))
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    assert torch.equal(head.weight, before)


def test_amp_matches_torch_in_float32_over_steps():
    """Five steps of a small classifier: fp16 autocast with kd_loss against float32 with torch's own losses."""
    x, t, y = torch.randn(64, 8), torch.randn(64, 10), torch.randint(10, (64,))
    start = torch.nn.Linear(8, 10).state_dict()

    def train(amp):
        head = torch.nn.Linear(8, 10)
        head.load_state_dict(start)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", enabled=amp)
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16, enabled=amp):
                logits = head(x)
                if amp:
                    loss = kd_loss(logits, t, y, label_weight=0.5, temperature=3.0)
                else:
                    soft = (
                        F.kl_div(F.log_softmax(logits / 3, -1), F.softmax(t / 3, -1), reduction="batchmean")
                        * 9
                    )
                    loss = 0.5 * soft + 0.5 * F.cross_entropy(logits, y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return loss.detach(), head.weight.detach()

    torch.testing.assert_close(train(True), train(False), rtol=5e-3, atol=5e-3)
