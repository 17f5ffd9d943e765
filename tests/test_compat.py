"""The conventions of other libraries as formulas in float64, written out per row, and fasttransfer.compat against them.

The formulas follow what the libraries compute, not their code; what they compute was read in their sources and run
beside these functions (docs/distillation.md says which versions).
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from fasttransfer.compat import functional, mdistiller, torchdistill, torchtune, trl

F64 = torch.float64
INF = math.inf


def probabilities(z, t=1.0):
    e = (z / t - (z / t).amax(-1, keepdim=True)).exp()
    return e / e.sum(-1, keepdim=True)


def x_log_ratio(a, b):
    """``a log(a/b)`` per element, 0 where a is."""
    some = a > 0
    return torch.where(some, a * (torch.where(some, a, 1.0).log() - torch.where(b > 0, b, 1.0).log()), 0.0)


def kl(a, b):
    """KL(a || b) per row."""
    return x_log_ratio(a, b).sum(-1)


def jsd(q, p, beta):
    """Per element, of the teacher's q and the student's p."""
    if beta in (0, 1):
        return x_log_ratio(q, p) if beta == 0 else x_log_ratio(p, q)
    m = beta * q + (1 - beta) * p
    return beta * x_log_ratio(q, m) + (1 - beta) * x_log_ratio(p, m)


def check(formula, function, student, teacher, *args, rtol=2e-5, atol=2e-6, **kwargs):
    """``formula`` of float64 logits, ``function`` of the given ones: values and the student's gradient."""
    exact, leaf = student.double().detach().requires_grad_(), student.detach().clone().requires_grad_()
    expected = formula(exact, teacher.double())
    actual = function(leaf, teacher, *args, **kwargs)
    assert actual.dtype == (F64 if F64 in (student.dtype, teacher.dtype) else torch.float32)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)
    weight = torch.randn(expected.shape, dtype=F64)
    (grad,) = torch.autograd.grad((expected * weight).sum(), exact)
    (ours,) = torch.autograd.grad((actual * weight).sum(), leaf)
    rounding = (
        2**-7 if student.dtype == torch.bfloat16 else rtol
    )  # stored, then scaled by what comes from above
    torch.testing.assert_close(ours.double(), grad, rtol=rounding, atol=atol)


def pair(*size, dtype=torch.float32, scale=2.0):
    return (scale * torch.randn(size)).to(dtype), (scale * torch.randn(size)).to(dtype)


# ------------------------------------------------------------------------------------------------------------- TRL
@pytest.mark.parametrize("beta", [0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_trl(one_backend, beta, reduction):
    for dtype in (torch.float32, torch.bfloat16, F64):
        s, t = pair(3, 4, 20, dtype=dtype)
        labels = torch.randint(1000, (3, 4))  # beyond V: only -100 means something
        labels[0, :3] = labels[2, 1] = -100
        for mask in (None, labels):
            for items in (None, 5, torch.tensor(5)):

                def formula(s, t, mask=mask, items=items):
                    d = jsd(probabilities(t, 2.0), probabilities(s, 2.0), beta)
                    d = d if mask is None else d[mask != -100]
                    if items is not None:
                        return d.sum() / 5
                    rows = 3 if mask is None else 8  # the batch, or the rows that count
                    return {"batchmean": d.sum() / rows, "mean": d.mean(), "sum": d.sum(), "none": d}[
                        reduction
                    ]

                check(formula, trl.generalized_jsd_loss, s, t, mask, beta, 2.0, reduction, items)


def test_trl_with_probabilities(one_backend):
    p, q = torch.rand(2, 3, 10), torch.rand(2, 3, 10)  # not normalised
    p[0, 0], q[0, 1] = 0, 0
    labels = torch.tensor([[0, 0, -100], [0, 0, 0]])
    for beta in (0, 0.4, 1):
        for reduction, divisor in (("batchmean", 5), ("mean", 50), ("sum", 1)):
            check(
                lambda p, q, b=beta, n=divisor: (
                    jsd(q.clamp_min(1e-8), p.clamp_min(1e-8), b)[labels != -100].sum() / n
                ),
                trl.generalized_jsd_loss, p, q, labels=labels, beta=beta, reduction=reduction, temperature=7.0,
                logits_are_probs=True, atol=1e-5,
            )  # fmt: skip


def test_trl_without_its_nan(one_backend):
    """Columns that both sides mask, and no row that counts."""
    s, t = pair(2, 3, 10)
    s[..., 7:], t[..., 7:] = -INF, -INF
    for beta in (0, 0.5, 1):
        for reduction in ("batchmean", "none"):
            check(
                lambda s, t, b=beta, r=reduction: (
                    lambda d: torch.cat([d, torch.zeros(2, 3, 3)], -1) if r == "none" else d.sum() / 2
                )(jsd(probabilities(t[..., :7]), probabilities(s[..., :7]), b)),
                trl.generalized_jsd_loss, s, t, beta=beta, reduction=reduction,
            )  # fmt: skip
        leaf = s.clone().requires_grad_()
        for reduction in ("batchmean", "mean", "sum"):
            loss = trl.generalized_jsd_loss(leaf, t, torch.full((2, 3), -100), beta, reduction=reduction)
            assert loss == 0
            assert torch.autograd.grad(loss, leaf)[0].eq(0).all()


# ------------------------------------------------------------------------------------------------------- torchtune
def cross_entropy(p, q, finite):
    return -(q * torch.where(finite, p, 1.0).log()).sum(-1)


def torchtune_rows(s, t, ratio):
    """Per row: infinite columns are left out of the sums, not of the softmaxes."""
    p, q = probabilities(s), probabilities(t)
    both = s.isfinite() & t.isfinite()
    reverse = torch.where(both, x_log_ratio(torch.where(both, p, 0.0), torch.where(both, q, 1.0)), 0.0).sum(
        -1
    )
    return ratio * cross_entropy(p, q, s.isfinite()) + (1 - ratio) * reverse


TORCHTUNE = {"Forward": 1.0, "Reverse": 0.0, "Symmetric": 0.3}


def torchtune_loss(name, chunked):
    options = {"sym_kd_ratio": 0.3} if name == "Symmetric" else {}
    return getattr(torchtune, f"{name}KL{'WithChunkedOutput' if chunked else ''}Loss")(
        ignore_index=7, **options
    )


@pytest.mark.parametrize("name", TORCHTUNE)
@pytest.mark.parametrize("masked", ["nothing", "student", "teacher", "both"])
def test_torchtune(one_backend, name, masked):
    s, t = pair(2, 6, 20)
    if masked in ("student", "both"):
        s[..., 15:] = -INF
    if masked in ("teacher", "both"):
        t[..., 15:] = -INF
    labels = torch.randint(8, 1000, (2, 6))
    labels[0, :4] = labels[1, 5] = 7
    ratio, keep = TORCHTUNE[name], labels != 7
    loss = torchtune_loss(name, False)

    def total(s, t):
        return torchtune_rows(s, t, ratio)[keep].sum()

    check(lambda s, t: total(s, t) / 7, loss, s, t, labels)
    check(total, loss, s, t, labels, normalize=False, atol=1e-5)
    flat = (x.flatten(0, 1) for x in (s, t))
    check(lambda s, t: torchtune_rows(s, t, ratio)[keep.flatten()].sum() / 7, loss, *flat, labels)
    chunks = torchtune_loss(name, True)
    for count in (1, 4):  # 4: lengths 2, 2, 1, 1, which labels.chunk(4) would not have
        check(
            lambda s, t: total(s, t) / 7,
            lambda s, t, n=count: chunks(list(s.tensor_split(n, 1)), list(t.tensor_split(n, 1)), labels),
            s,
            t,
        )
    with torch.no_grad():
        value = loss(s.bfloat16(), t.bfloat16(), labels)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("name", TORCHTUNE)
def test_torchtune_without_a_row(one_backend, name):
    s, t = pair(2, 4, 10)
    s[0] = math.nan
    for chunked in (False, True):
        leaf = s.clone().requires_grad_()
        args = ([leaf], [t]) if chunked else (leaf, t)
        loss = torchtune_loss(name, chunked)(*args, torch.full((2, 4), 7))
        loss.backward()
        assert loss == 0
        assert leaf.grad.eq(0).all()


def test_torchtune_arguments():
    with pytest.raises(ValueError, match="sym_kd_ratio must be between 0 and 1"):
        torchtune.SymmetricKLLoss(1.5)
    s, t = pair(2, 4, 10)
    labels = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(
        ValueError, match=r"a label for each row of student_logits \[2, 4, 10\], got \[1, 4\]"
    ):
        torchtune.ForwardKLLoss()(s, t, labels[:1])
    chunked = torchtune.ForwardKLWithChunkedOutputLoss()
    with pytest.raises(ValueError, match="as many chunks, got 1 and 2"):
        chunked([s], [t, t], labels)
    with pytest.raises(ValueError, match=r"the length of all chunks, got \[2, 4\] for \[2\]"):
        chunked([s[:, :2]], [t[:, :2]], labels)
    assert chunked.apply_compile_strategy(one_backend="inductor") is chunked


# ------------------------------------------------------------------------------------------------------ mdistiller
def standardized(z):
    return (z - z.mean(-1, keepdim=True)) / (z.std(-1, keepdim=True) + 1e-7)


@pytest.mark.parametrize("standardize", [False, True])
def test_mdistiller(one_backend, standardize):
    around = standardized if standardize else (lambda z: z)
    s, t = pair(5, 12)
    target = torch.randint(12, (5,))
    others = torch.ones(5, 12, dtype=torch.bool).scatter_(1, target[:, None], False)

    def plain(s, t):
        return 9 * kl(probabilities(around(t), 3.0), probabilities(around(s), 3.0)).mean()

    def decoupled(s, t):
        s, t = around(s), around(t)
        p, q = probabilities(s, 3.0), probabilities(t, 3.0)
        a, b = (x.gather(1, target[:, None]) for x in (p, q))
        tckd = kl(torch.cat([b, 1 - b], 1), torch.cat([a, 1 - a], 1))
        nckd = kl(*(probabilities(z[others].reshape(5, 11), 3.0) for z in (t, s)))
        return 9 * (0.5 * tckd + 8.0 * nckd).mean()

    check(plain, mdistiller.kd_loss, s, t, 3.0, standardize)
    check(decoupled, mdistiller.dkd_loss, s, t, target, 0.5, 8.0, 3.0, standardize, atol=1e-5)
    if not standardize:
        maps = pair(2, 6, 3, 2)
        check(
            lambda s, t: 9 * kl(probabilities(t.movedim(1, -1), 3.0), probabilities(s.movedim(1, -1), 3.0)).mean(),
            mdistiller.kd_loss, *maps, 3.0,
        )  # fmt: skip


def test_mdistiller_where_mass_underflows(one_backend):
    """Its log of 0 is NaN or infinite; the loss is neither."""
    s, t = torch.zeros(2, 4), torch.randn(2, 4)
    s[0, 1], s[1, 2] = 200.0, -200.0
    loss = mdistiller.dkd_loss(s.requires_grad_(), t, torch.tensor([1, 2]), 1.0, 8.0, 1.0)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()


def test_mdistiller_arguments():
    s, t = pair(2, 3, 4)
    with pytest.raises(ValueError, match=r"logit_stand takes logits \[batch, classes\]"):
        mdistiller.kd_loss(s, t, 1.0, True)
    with pytest.raises(ValueError, match=r"logits_student must be \[batch, classes\]"):
        mdistiller.dkd_loss(s, t, torch.zeros(2), 1.0, 8.0, 1.0)


# ---------------------------------------------------------------------------------------------------- torchdistill
@pytest.mark.parametrize("name", ["KDLoss", "LogitStdKDLoss"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
def test_torchdistill(one_backend, name, reduction):
    around = standardized if name == "LogitStdKDLoss" else (lambda z: z)
    s, t = pair(5, 12)
    targets = torch.randint(12, (5,))
    targets[1] = -100

    def soft(s, t):
        d = kl(probabilities(around(t), 3.0), probabilities(around(s), 3.0)).sum()
        return d / {"batchmean": 5, "mean": 60, "sum": 1}[reduction]

    def hard(s):
        ce = -probabilities(s)[torch.arange(5), targets.clamp_min(0)].log()
        return ce[targets != -100].sum() / (1 if reduction == "sum" else 4)

    def criterion(alpha=None, beta=None):
        loss = getattr(torchdistill, name)(
            "s", "output", "t", "input", 3.0, alpha=alpha, beta=beta, reduction=reduction
        )
        return lambda s, t, targets: loss({"s": {"output": s}}, {"t": {"input": t}}, targets)

    check(lambda s, t: 0.3 * hard(s) + 0.7 * 9 * soft(s, t), criterion(0.3), s, t, targets, atol=1e-5)
    check(lambda s, t: 0.3 * hard(s) + 2 * 9 * soft(s, t), criterion(0.3, 2.0), s, t, targets, atol=2e-5)
    check(soft, criterion(0.3, 2.0), s, t, None)  # neither beta nor T^2 where the labels are missing
    check(soft, criterion(0.0, 2.0), s, t, targets)
    check(soft, criterion(), s, t, targets)


def test_torchdistill_maps_elements_and_smoothing(one_backend):
    s, t = pair(2, 6, 3, 2)
    targets = torch.randint(6, (2, 3, 2))
    targets[0, 0, 0] = 4
    last = lambda z: z.movedim(1, -1)  # noqa: E731

    def formula(s, t):
        soft = kl(probabilities(last(t), 2.0), probabilities(last(s), 2.0)).sum() / 2  # by the batch size
        return 0.5 * F.cross_entropy(s, targets, ignore_index=4, label_smoothing=0.1) + 0.5 * 4 * soft

    loss = torchdistill.LogitsKDLoss(2.0, 0.5, ignore_index=4, label_smoothing=0.1)
    check(formula, loss, s, t, targets, atol=1e-5)
    elements = torchdistill.LogitsKDLoss(2.0, 0.5, reduction="none")
    check(
        lambda s, t: x_log_ratio(probabilities(last(t), 2.0), probabilities(last(s), 2.0)).movedim(-1, 1),
        elements, s, t,
    )  # fmt: skip
    with pytest.raises(ValueError, match="reduction='none' has no sum"):
        elements(s, t, targets)
    standard = torchdistill.LogitStdKDLoss("s", "output", "t", "output", 2.0, reduction="none")
    a, b = pair(3, 6)
    check(
        lambda s, t: x_log_ratio(probabilities(standardized(t), 2.0), probabilities(standardized(s), 2.0)),
        lambda s, t: standard({"s": {"output": s}}, {"t": {"output": t}}), a, b,
    )  # fmt: skip
    with pytest.raises(ValueError, match="standardized logits must be"):
        standard({"s": {"output": s}}, {"t": {"output": t}})
    with pytest.raises(ValueError, match="eps must be 1e-07, got 0"):
        torchdistill.LogitStdKDLoss("s", "output", "t", "output", 2.0, eps=0.1)


# -------------------------------------------------------------------------------------------------------- F.kl_div
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
def test_kl_div(one_backend, reduction):
    for dim in (1, -1):
        s, t = pair(3, 8, 5)

        def formula(s, t, dim=dim):
            d = x_log_ratio(probabilities(t.movedim(dim, -1), 2.0), probabilities(s.movedim(dim, -1), 2.0))
            return {"mean": d.mean(), "batchmean": d.sum() / 3, "sum": d.sum(), "none": d.movedim(-1, dim)}[
                reduction
            ]

        check(formula, functional.kl_div_with_logits, s, t, reduction, temperature=2.0, dim=dim, atol=1e-5)
    s, t = pair(4, 8)
    log_probs = torch.log_softmax(t, -1)
    expected = F.kl_div(torch.log_softmax(s, -1), log_probs, reduction=reduction, log_target=True)
    torch.testing.assert_close(functional.kl_div_with_logits(s, log_probs, reduction), expected)
    one_hot = F.one_hot(torch.arange(4), 8).float()
    expected = F.kl_div(torch.log_softmax(s, -1), one_hot, reduction=reduction)
    torch.testing.assert_close(functional.kl_div_with_logits(s, one_hot.log(), reduction), expected)


# ------------------------------------------------------------------------------------------------------------- all
def test_signatures():
    """Names, order and defaults of the originals; what they do not have is behind a *."""
    expected = {
        trl.generalized_jsd_loss: "student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, "
        "reduction='batchmean', num_items_in_batch=None, *, logits_are_probs=False",
        torchtune.ForwardKLLoss: "ignore_index=-100",
        torchtune.ReverseKLLoss: "ignore_index=-100",
        torchtune.SymmetricKLLoss: "sym_kd_ratio=0.5, ignore_index=-100",
        torchtune.ForwardKLLoss.forward: "self, student_logits, teacher_logits, labels, normalize=True",
        torchtune.ForwardKLWithChunkedOutputLoss: "num_output_chunks=8, ignore_index=-100",
        torchtune.ReverseKLWithChunkedOutputLoss: "num_output_chunks=8, ignore_index=-100",
        torchtune.SymmetricKLWithChunkedOutputLoss: "num_output_chunks=8, sym_kd_ratio=0.5, ignore_index=-100",
        mdistiller.kd_loss: "logits_student, logits_teacher, temperature, logit_stand=False",
        mdistiller.dkd_loss: "logits_student, logits_teacher, target, alpha, beta, temperature, logit_stand=False",
        torchdistill.KDLoss: "student_module_path, student_module_io, teacher_module_path, teacher_module_io, "
        "temperature, alpha=None, beta=None, reduction='batchmean', **kwargs",
        torchdistill.LogitStdKDLoss: "student_module_path, student_module_io, teacher_module_path, "
        "teacher_module_io, temperature, eps=1e-07, alpha=None, beta=None, reduction='batchmean', **kwargs",
        torchdistill.LogitsKDLoss: "temperature, alpha=None, beta=None, reduction='batchmean', *, "
        "ignore_index=-100, label_smoothing=0.0",
    }  # fmt: skip
    for function, text in expected.items():
        parameters = inspect.signature(function).parameters.values()
        plain = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
        assert str(plain) == f"({text})", function


def test_the_kernels_run(monkeypatch, one_backend):
    """Of every function with a reduction, none goes through softmaxes of its own."""

    def refuse(*args, **kwargs):
        raise AssertionError("a softmax was taken")

    monkeypatch.setattr("fasttransfer.compat.elements.torch.log_softmax", refuse)
    s, t = pair(2, 3, 10)
    labels = torch.zeros(2, 3, dtype=torch.long)
    for reduction in ("batchmean", "mean", "sum"):
        trl.generalized_jsd_loss(s, t, labels, reduction=reduction)
        functional.kl_div_with_logits(s, t, reduction)
    for name in TORCHTUNE:
        torchtune_loss(name, False)(s, t, labels)
    with pytest.raises(AssertionError, match="a softmax was taken"):
        functional.kl_div_with_logits(s, t, "none")


def _logits(*size):
    return torch.zeros(*(size or (2, 5)))


WRONG = {
    "kl_div: one dimension too few": (
        ValueError,
        "classes in dimension 2",
        lambda: functional.kl_div_with_logits(_logits(), _logits(), dim=2),
    ),
    "kl_div: no tensor": (
        TypeError,
        "student_logits must be a tensor",
        lambda: functional.kl_div_with_logits([1.0], _logits()),
    ),
    "kl_div: dim": (
        TypeError,
        "dim must be an integer",
        lambda: functional.kl_div_with_logits(_logits(), _logits(), dim="a"),
    ),
    "kl_div: widths": (
        ValueError,
        r"\[2, 5\], got \[2, 6\]",
        lambda: functional.kl_div_with_logits(_logits(), _logits(2, 6)),
    ),
    "trl: labels": (
        ValueError,
        "a label for each row",
        lambda: trl.generalized_jsd_loss(_logits(), _logits(), torch.zeros(3)),
    ),
    "trl: no labels": (
        TypeError,
        "labels must be a tensor",
        lambda: trl.generalized_jsd_loss(_logits(), _logits(), [1, 2]),
    ),
    "trl: probs": (
        TypeError,
        "logits_are_probs must be True or False",
        lambda: trl.generalized_jsd_loss(_logits(), _logits(), logits_are_probs="no"),
    ),
    "trl: items": (
        ValueError,
        "num_items_in_batch must be greater than 0",
        lambda: trl.generalized_jsd_loss(_logits(), _logits(), num_items_in_batch=0),
    ),
    "trl: item": (
        ValueError,
        "num_items_in_batch must be greater than 0",
        lambda: trl.generalized_jsd_loss(_logits(), _logits(), num_items_in_batch=torch.tensor(0)),
    ),
    "mdistiller: one dimension": (
        ValueError,
        "classes in dimension 1",
        lambda: mdistiller.kd_loss(_logits(5), _logits(5), 4.0),
    ),
    "mdistiller: target": (
        TypeError,
        "target must be",
        lambda: mdistiller.dkd_loss(_logits(), _logits(), [0, 1], 1.0, 8.0, 4.0),
    ),
    "torchdistill: smoothing": (
        ValueError,
        "label_smoothing must be between 0 and 1",
        lambda: torchdistill.LogitsKDLoss(1.0, label_smoothing=3),
    ),
    "torchdistill: targets": (
        TypeError,
        "targets must be",
        lambda: torchdistill.LogitsKDLoss(1.0, 0.5)(_logits(), _logits(), [0, 1]),
    ),
    "torchdistill: path": (
        ValueError,
        "student_module_path 'a' is not in",
        lambda: torchdistill.KDLoss("a", "output", "b", "output", 1.0)({}, {}),
    ),
    "torchdistill: io": (
        ValueError,
        "student_module_io 'input' was not recorded",
        lambda: torchdistill.KDLoss("a", "input", "b", "output", 1.0)({"a": {"output": _logits()}}, {}),
    ),
    "torchtune: index": (TypeError, "ignore_index must be an int", lambda: torchtune.ForwardKLLoss("x")),
    "torchtune: chunks": (
        TypeError,
        "student_logits must be a list of chunks",
        lambda: torchtune.ForwardKLWithChunkedOutputLoss()(
            _logits(2, 3, 5), [_logits(2, 3, 5)], torch.zeros(2, 3).long()
        ),
    ),
    "torchtune: none": (
        TypeError,
        "student_logits must be a list of chunks",
        lambda: torchtune.ForwardKLWithChunkedOutputLoss()([], [], torch.zeros(2, 0).long()),
    ),
    "torchtune: labels": (
        ValueError,
        r"labels must be \[batch, length\]",
        lambda: torchtune.ForwardKLWithChunkedOutputLoss()(
            [_logits(2, 3, 5)], [_logits(2, 3, 5)], torch.zeros(6).long()
        ),
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(case):
    error, message, call = WRONG[case]
    with pytest.raises(error, match=message):
        call()
