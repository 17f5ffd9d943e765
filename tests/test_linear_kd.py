"""linear_kd_loss against whole logits in float64: values, gradients, rows, special numbers, dtypes."""

import pytest
import torch

import fasttransfer
from fasttransfer import kd_loss, linear_kd_loss
from tests import oracle
from tests.linear_kd_calls import Sides, call, check, exact, logits, sides

INF = float("inf")
LABELLED = {"label_weight": 0.3, "temperature": 2.0}
Y = torch.tensor([[3, -100, 0, 29], [-100, 7, -100, 12]])
OPTIONS = {
    "plain": {},
    "T": {"temperature": 3.0, "scale_by_t2": False},
    "T per row": {"temperature": torch.linspace(0.5, 3, 8).reshape(2, 4)},
    "labels": LABELLED,
    "labels, batchmean": {**LABELLED, "reduction": "batchmean", "label_smoothing": 0.2},
    "labels only": {"label_weight": 1.0, "reduction": "sum"},
    "distill ignored": {**LABELLED, "ignored_rows": "distill"},
    "pair of items": {**LABELLED, "ignored_rows": "distill", "num_items": (11.0, 3.0)},
    "row_weight": {"row_weight": torch.tensor([[1.0, 0.0, 2.5, 0.3], [-1.0, 1.0, 0.0, 2.0]])},
    "num_items": {"num_items": 5},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3, "temperature": 2.0},
    "reverse, labels": {**LABELLED, "divergence": "reverse_kl", "softcap": (5.0, None)},
    "tvd, standardized": {"divergence": "tvd", "standardize": True, "reduction": "sum"},
}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(backend, options):
    options = OPTIONS[options]
    labels = Y if "label_weight" in options else None
    for chunk_rows in (3, None):
        check(sides(2, 4), labels, chunk_rows=chunk_rows, **options)
    check(sides(2, 4, dtype=torch.float32), labels, chunk_rows=3, **options)


@pytest.mark.parametrize("options", ["plain", "T per row", "labels", "row_weight", "jsd"])
def test_loss_per_row(backend, options):
    """Upstream gradients of either sign and 0; where head and bias are frozen nothing is computed twice."""
    options = {**OPTIONS[options], "reduction": "none", "chunk_rows": 3}
    labels = Y if "label_weight" in options else None
    upstream = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 4)
    upstream[0, 2] = 0
    given = sides(2, 4)
    check(given, labels, upstream, **options)
    check(
        given._replace(student_head=given.student_head.detach(), student_bias=None),
        labels,
        upstream,
        **options,
    )
    check(sides(2, 4, dtype=torch.float32, teacher_dtype=torch.float64), labels, upstream, **options)


@pytest.mark.parametrize("chunk_rows", [1, 2, 5, 7, 100])
def test_chunks_of_any_size(backend, chunk_rows):
    given = sides(7, bias=False)
    check(given, chunk_rows=chunk_rows)
    check(given, torch.arange(7), chunk_rows=chunk_rows, label_weight=0.5, reduction="none")


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("teacher", oracle.DTYPES, ids=str)
def test_dtypes(backend, dtype, teacher):
    given = sides(9, dtype=dtype, teacher_dtype=teacher)
    loss, _ = check(given, chunk_rows=4, temperature=2.0)
    assert loss.dtype == (torch.float64 if torch.float64 in (dtype, teacher) else torch.float32)


@pytest.mark.parametrize("which", range(1, 8))
def test_what_is_frozen_has_no_gradient_and_costs_none(backend, which):
    given = sides(6, dtype=torch.float32)
    frozen = [x.detach().requires_grad_(bool(which >> i & 1)) for i, x in enumerate(given[:3])]
    given = Sides(*frozen, *given[3:])
    for reduction in ("mean", "none"):
        _, grads = check(given, chunk_rows=4, reduction=reduction)
        assert len(grads) == which.bit_count()


def test_vocabularies_of_different_width(backend):
    given = sides(5, vocab=40, teacher_vocab=33)
    with torch.no_grad():
        given.student_head[31:] = torch.nan  # padding, which is not read
        given.teacher_bias[31:] = torch.nan
    for reduction in ("mean", "none"):
        loss = call(given, vocab_size=31, chunk_rows=2, reduction=reduction)
        grads = torch.autograd.grad(loss.sum(), given.trained())
        cut = given._replace(student_head=given.student_head.detach()[:31].requires_grad_(),
                             student_bias=given.student_bias.detach()[:31].requires_grad_(),
                             teacher_head=given.teacher_head[:31], teacher_bias=given.teacher_bias[:31])  # fmt: skip
        _, expected = check(cut, chunk_rows=2, reduction=reduction)
        for grad, of_cut in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad[: len(of_cut)], of_cut)
            assert not grad[len(of_cut) :].any()


def test_masked_columns(backend):
    """A bias of -inf masks a column, on the teacher's side too where the student has it."""
    given = sides(6, dtype=torch.float32)
    with torch.no_grad():
        given.student_bias[[1, 39]] = -INF
        given.teacher_bias[[0, 1, 39]] = -INF
    _, (_, head, bias) = check(given, chunk_rows=4)
    assert not head[[1, 39]].any()
    assert not bias[[1, 39]].any()
    with torch.no_grad():
        given.teacher_bias[1] = 0
    loss = call(given)
    assert loss == INF
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, given.trained()))


def test_large_logits(backend):
    for dtype in (torch.float64, torch.float32):
        given = sides(6, dtype=dtype)
        with torch.no_grad():
            for head in (given.student_head, given.teacher_head):
                head.mul_(1e4 / head.abs().max())
        # An fp32 logit of 1e4 is off by 5e-4, and so is the student's softmax.
        check(given, chunk_rows=4, temperature=2.0, bound=None if dtype == torch.float64 else 2e-3)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_no_rows(backend, shape):
    given = sides(*shape, dtype=torch.float32)
    for reduction in ("mean", "sum", "none"):
        loss = call(given, reduction=reduction)
        assert loss.shape == (shape if reduction == "none" else ())
        grads = torch.autograd.grad(loss.sum(), given.trained())
        assert loss.sum() == 0
        assert not any(x.any() for x in grads)


def test_nothing_is_counted(backend):
    given = sides(4, dtype=torch.float16)
    for options in ({"row_weight": torch.zeros(4)}, {"labels": torch.full((4,), -100), "label_weight": 0.5}):
        loss = call(given, **options)
        grads = torch.autograd.grad(loss, given.trained())
        assert loss == 0
        assert not any(x.any() for x in grads)


def test_one_row_without_leading_dimensions(backend):
    given = sides()
    check(given)
    check(given, torch.tensor(3), label_weight=0.5, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_that_do_not_count_are_not_read(backend, dtype):
    """A NaN in the hidden state of an ignored row reaches neither the head's gradient nor anything else."""
    given = sides(2, 4, dtype=dtype)
    options = {**LABELLED, "chunk_rows": 3}
    for reduction in ("mean", "none"):
        clean, grads = check(given, Y, reduction=reduction, **options)
        hidden, teacher = given.student_hidden.detach().clone(), given.teacher_hidden.clone()
        hidden[Y == -100] = teacher[Y == -100] = torch.nan
        dirty = given._replace(student_hidden=hidden.requires_grad_(), teacher_hidden=teacher)
        loss = call(dirty, Y, reduction=reduction, **options)
        assert torch.equal(loss, clean)
        for grad, expected in zip(torch.autograd.grad(loss.sum(), dirty.trained()), grads, strict=True):
            assert torch.equal(grad, expected)


def test_the_way_without_looking_at_values(backend, monkeypatch):
    """On a device one may not look which rows count: the same result, also from NaN. Here the CPU is such a device."""
    given = sides(2, 4, dtype=torch.float16)
    weight = torch.tensor([[1.0, 0.0, 2.0**-6, 3.0], [1.0, 1e-3, 0.0, 2.0]])
    options = {**LABELLED, "row_weight": weight, "chunk_rows": 3}
    expected = check(given, Y, **options)
    with torch.no_grad():
        given.student_hidden[Y == -100] = given.teacher_hidden[Y == -100] = torch.nan
    monkeypatch.setattr("fasttransfer.ops.linear_kd.may_look", lambda _: False)
    loss = call(given, Y, **options)
    torch.testing.assert_close(loss, expected[0])
    for grad, other in zip(torch.autograd.grad(loss, given.trained()), expected[1], strict=True):
        assert oracle.norm_error(grad, other) < 2e-3


def test_strides(backend):
    """Shifted hidden states, a head that is a slice of an embedding, a transposed one; nothing of them is written."""
    whole = sides(3, 5)
    embedding = torch.randn(12, 50, dtype=torch.float64)
    given = Sides(
        whole.student_hidden.detach()[:, :-1].requires_grad_(), embedding.T[5:45].requires_grad_(), whole.student_bias,
        whole.teacher_hidden.transpose(0, 1)[:4].transpose(0, 1), whole.teacher_head[:, :9], whole.teacher_bias,
    )  # fmt: skip
    before = [x.detach().clone() for x in given]
    versions = [x._version for x in given]
    check(given, chunk_rows=5)
    assert all(torch.equal(x.detach(), y) for x, y in zip(given, before, strict=True))
    assert [x._version for x in given] == versions


def test_inputs_are_those_of_f_linear_and_kd_loss(backend):
    """Drop-in: the same numbers as two F.linear and kd_loss of whole logits, with the statistics."""
    given = sides(2, 4, dtype=torch.float32)
    s, t = logits(*given[:3]).float(), logits(*given[3:]).float()
    loss, stats = call(given, Y, **LABELLED, return_stats=True, chunk_rows=3)
    expected, expected_stats = kd_loss(s, t, Y, **LABELLED, return_stats=True)
    torch.testing.assert_close(loss, expected)
    for name, value, other in zip(stats._fields, stats, expected_stats, strict=True):
        torch.testing.assert_close(value, other, msg=name)
    per_row, stats = call(given, Y, **LABELLED, return_stats=True, reduction="none")
    assert stats.kl.shape == per_row.shape


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp16_does_not_underflow(backend, reduction):
    """A mean over 2^17 rows with rows of very different weight: the loss scale comes in backward only."""
    given = sides(6, vocab=300, dtype=torch.float16)
    options = {
        "row_weight": torch.tensor([1.0, 3.0, 0.0, 0.125, 1.0, 2.0**-9]),
        "chunk_rows": 4,
        "reduction": reduction,
    }
    scale = 2.0**17
    if reduction == "mean":
        options["num_items"], upstream = 2.0**17, scale
    else:
        upstream = torch.tensor([1.0, -1.0, 1.0, 2.0, -0.5, 1.0])
    for accum_dtype in (None, torch.float64):
        _, grads = check(given, upstream=upstream, accum_dtype=accum_dtype, **options)
        assert all(x.any() for x in grads)


def test_bf16_head_is_rounded_once():
    """Over 64 chunks: as good as one product by default, not so when summed in bfloat16."""
    given = sides(256, dtype=torch.bfloat16, bias=False)
    _, (_, target) = exact(given)
    errors = {}
    for name, options in {"whole": {"chunk_rows": 256}, "default": {"chunk_rows": 4},
                          "fp64": {"chunk_rows": 4, "accum_dtype": torch.float64},
                          "bf16": {"chunk_rows": 4, "accum_dtype": torch.bfloat16}}.items():  # fmt: skip
        (grad,) = torch.autograd.grad(call(given, **options), [given.student_head])
        errors[name] = oracle.norm_error(grad, target)
    assert errors["default"] <= 1.05 * errors["whole"]
    assert errors["fp64"] <= 1.05 * errors["whole"]
    assert errors["bf16"] > 1.5 * errors["whole"]


def test_accumulation_in_fp64():
    given = sides(64, dtype=torch.float32)
    errors = []
    for dtype in (None, torch.float64):
        grads = torch.autograd.grad(call(given, chunk_rows=1, accum_dtype=dtype), given.trained()[1:])
        errors.append([oracle.norm_error(x, y) for x, y in zip(grads, exact(given)[1][1:], strict=True)])
    assert all(wide <= plain for plain, wide in zip(*errors, strict=True))


def test_threads(threads):
    check(sides(20, dtype=torch.float32, vocab=500), chunk_rows=8, temperature=2.0)


def test_memory_is_that_of_a_chunk():
    """Two buffers of a chunk beside what is returned, whatever the number of rows."""
    from benchmarks.memory import peak_bytes

    if not fasttransfer.build_info()["cpu_kernels"]:
        pytest.skip("the pure-torch kernel of a chunk has temporaries of its own")
    given = sides(512, vocab=2000, widths=(16, 16), dtype=torch.float32, bias=False)
    returned = sum(x.nbytes for x in given.trained())
    peak = peak_bytes(lambda: torch.autograd.grad(call(given, chunk_rows=32), given.trained()))
    if peak is None:
        pytest.skip("the profiler says nothing")
    assert peak - returned <= 2 * 32 * 2000 * 4 + 100_000


def test_defaults_hold_the_workspace():
    from fasttransfer.ops.linear_kd import _rows_per_chunk, _Side

    def rows(count, vocab, width, dtype=torch.float32):
        side = _Side(torch.empty(count, width, dtype=dtype, device="meta"),
                     torch.empty(vocab, width, dtype=dtype, device="meta"), None)  # fmt: skip
        return _rows_per_chunk(count, side, side)

    assert rows(2048, 32000, 512) == 256  # a head of 62.5 MiB
    assert rows(8192, 128256, 4096, torch.bfloat16) == 2048
    assert rows(8, 1000, 64) == 16
    assert 1 <= rows(4, 10**8, 4) <= 16
    assert rows(0, 100, 4) >= 0


def test_it_is_exported():
    given = sides(3)
    hidden, head, _, teacher_hidden, teacher_head, _ = given
    torch.testing.assert_close(
        linear_kd_loss(hidden, head, teacher_hidden, teacher_head).detach(),
        exact(given._replace(student_bias=None, teacher_bias=None))[0],
    )
