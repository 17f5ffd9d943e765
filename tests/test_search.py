"""sweep_alpha and kfold_search: what is evaluated, what is chosen, folds, early stopping, errors."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fasttransfer import L2SP, LinearMap, blend, kfold_search, sweep_alpha
from tests.nets import Net, move, tied

NAN, INF = float("nan"), float("inf")


def values_of(module):
    return {name: t.detach().clone() for name, t in module.state_dict().items()}


def assert_same(a, b):
    assert list(a) == list(b)
    assert all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.fixture
def models():
    """Two models with different weights, statistics and counters."""
    pair = Net(), Net()
    for model, batches in zip(pair, (5, 3), strict=True):
        for _ in range(batches):
            model(torch.randn(8, 4))
    return pair


# ---------------------------------------------------------------------------------------------------- sweep_alpha


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"source_scale": 0.5},
        {"source_scale": {"head.*": 1.0, "*": torch.tensor(-0.25)}},
        {"transform": {"head.weight": torch.eye(5)[[1, 0, 2, 4, 3]]}},
    ],
)
def test_each_alpha_is_evaluated_on_the_blended_module(backend, models, options):
    target, source = models
    before = values_of(target), values_of(source)
    seen = []
    alphas = [1.0, 0.25, 0.0]

    def evaluate(model):
        assert type(model) is Net
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())
        seen.append(values_of(model))
        return len(seen)

    found = sweep_alpha(target, source, alphas, evaluate, **options)
    for alpha, values in zip(alphas, seen, strict=True):
        expected = blend(target, source, alpha, **options)
        expected = {name: expected[name].detach() for name in before[0]}
        if "transform" in options:  # blend fuses it, which rounds once less
            torch.testing.assert_close(values, expected)
        else:
            assert_same(values, expected)
    assert found == (alphas, [1.0, 2.0, 3.0], 0.0, 3.0)
    assert_same(values_of(target), before[0])
    assert_same(values_of(source), before[1])


def test_nothing_leaks_into_the_next_alpha_or_the_models(models):
    target, source = models
    target.head.bias.requires_grad_(False)
    target.backbone.eval()
    target.head.register_buffer("scratch", torch.zeros(2), persistent=False)
    target.head.weight.grad = torch.ones_like(target.head.weight)
    before = values_of(target), values_of(source)
    scores = []

    def evaluate(model):
        modes = [m.training for m in model.modules()]
        assert modes == [m.training for m in target.modules()]
        assert all(p.grad is None for p in model.parameters())
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in target.parameters()]
        assert not model.head.scratch.any()
        scores.append({name: t.clone() for name, t in model.state_dict().items()})
        model.train()
        model(torch.randn(8, 4)).sum().backward()
        move(model)
        model.head.scratch += 1
        model.requires_grad_(False)
        model.head = nn.Identity()
        return 0.0

    found = sweep_alpha(target, source, [0.5, 0.5, 0.5], evaluate)
    assert found.best_alpha == 0.5
    assert_same(scores[0], scores[1])
    assert_same(scores[0], scores[2])
    assert_same(values_of(target), before[0])
    assert_same(values_of(source), before[1])
    assert (target.head.weight.grad == 1).all()
    assert target.training


@pytest.mark.parametrize("ruin", ["half", "data", "extra", "hook", "raises"])
def test_whatever_evaluate_does(models, ruin):
    """Memory that it exchanges, hooks and layers that it adds; and where it raises the models are as before."""
    target, source = models
    before, expected = (values_of(target), values_of(source)), blend(target, source, 0.5)
    calls = []

    def evaluate(model):
        calls.append(list(map(str, model.children())))
        assert calls[-1] == calls[0]
        assert not model._forward_hooks
        assert_same(values_of(model), {name: expected[name].detach() for name in before[0]})
        if ruin == "half":
            model.half()
        elif ruin == "data":
            model.head.weight.data = torch.zeros(3, 5)
        elif ruin == "extra":
            model.extra = nn.Linear(2, 2)
            model.head.weight.detach().zero_()
        elif ruin == "hook":
            model.register_forward_hook(lambda *_: None)
        else:
            move(model)
            raise RuntimeError("no score")
        return 0.0

    if ruin == "raises":
        with pytest.raises(RuntimeError, match="no score"):
            sweep_alpha(target, source, [0.5] * 3, evaluate)
    else:
        sweep_alpha(target, source, [0.5] * 3, evaluate)
    assert_same(values_of(target), before[0])
    assert_same(values_of(source), before[1])


def test_one_copy_for_all_alphas(models):
    """No deepcopy and no new memory after the first alpha; a transform is computed once."""
    target, source = models
    seen, mapped = [], []

    def swap(weight):
        mapped.append(weight)
        return weight.flip(0)

    def evaluate(model):
        seen.append([id(model), *(t.data_ptr() for t in model.state_dict().values())])
        return 0.0

    sweep_alpha(target, source, [0.1, 0.5, 1.0], evaluate, transform={"head.weight": swap})
    assert seen[0] == seen[1] == seen[2]
    assert len(mapped) == 1


def test_the_best_alpha_of_a_real_problem():
    """Two halves of what generates the data: the middle is best, and it is found by loss and by its negative."""
    truth, target = nn.Linear(3, 1), nn.Linear(3, 1)
    with torch.no_grad():
        source = copy.deepcopy(target)
        for t, s, p in zip(target.parameters(), source.parameters(), truth.parameters(), strict=True):
            s.copy_(2 * p - t)
    x = torch.randn(20, 3)
    y = truth(x).detach()
    alphas = torch.linspace(0, 1, 5)
    loss = sweep_alpha(target, source, alphas, lambda m: F.mse_loss(m(x), y), maximize=False)
    negative = sweep_alpha(target, source, np.linspace(0, 1, 5), lambda m: -F.mse_loss(m(x), y).item())
    assert loss.best_alpha == negative.best_alpha == 0.5
    assert loss.alphas == negative.alphas == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert loss.scores == [-s for s in negative.scores]
    assert loss.best_score == min(loss.scores) < 1e-10


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t,
        lambda t: [t, t + 1],
        lambda t: {"a": t, "n": torch.tensor(3)},
        lambda t: iter([t, t + 1]),
        lambda t: (u for u in (t, t + 1)),
    ],
)
def test_tensors_lists_dicts_and_iterators(backend, make):
    a, b = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    before = a.detach().clone(), b.detach().clone()
    kind = make(a)
    kind = type(kind) if isinstance(kind, (torch.Tensor, dict)) else list
    seen = []

    def evaluate(blended):
        assert isinstance(blended, kind)
        assert torch.is_grad_enabled()
        parts = blended.values() if kind is dict else [blended] if kind is torch.Tensor else blended
        assert not any(t.requires_grad for t in parts)
        seen.append([t.clone() for t in parts])
        for t in parts:
            t.zero_()
        return 1

    sweep_alpha(make(a), make(b), [0.5, 0.25], evaluate)
    torch.testing.assert_close(seen[0][0], 0.5 * before[0] + 0.5 * before[1])
    torch.testing.assert_close(seen[1][0], 0.25 * before[0] + 0.75 * before[1])
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_the_target_itself_and_tied_parameters(backend):
    model = tied()
    found = sweep_alpha(model, model, [0.5], lambda m: (m[0].weight is m[1].weight) + m[0].weight[0, 0])
    torch.testing.assert_close(found.best_score, 1 + model[0].weight[0, 0].item())


def test_a_fitted_map_as_the_transform(backend):
    target, source = torch.randn(4, 3), torch.randn(4, 5)
    layer = LinearMap(5, 3).fit(source, target)
    found = sweep_alpha(target, source, [0.0], lambda t: (t - target).square().sum(), transform=layer)
    assert found.best_score < 1e-8


@pytest.mark.parametrize(
    "scores, maximize, best",
    [
        ([1.0, 3.0, 3.0, 2.0], True, 1),
        ([2.0, 1.0, 1.0, 3.0], False, 1),
        ([NAN, 1.0, NAN, 2.0], True, 3),
        ([NAN, 1.0, NAN, 2.0], False, 1),
        ([NAN, -INF, NAN, NAN], True, 1),
        ([0.0, INF, 0.0, -INF], False, 3),
        ([np.float32(0.5), torch.tensor([[2.0]]), 1, torch.tensor(2)], True, 1),
    ],
)
def test_the_best_score(scores, maximize, best):
    given = iter(scores)
    alphas = [0.1, 0.2, 0.3, 0.4]
    found = sweep_alpha(torch.ones(2), torch.ones(2), alphas, lambda _: next(given), maximize=maximize)
    assert found.best_alpha == alphas[best]
    assert found.best_score == float(scores[best])
    assert all(type(s) is float for s in found.scores)


def test_nan_for_every_alpha():
    with pytest.raises(ValueError, match="NaN for every alpha"):
        sweep_alpha(torch.ones(2), torch.ones(2), [0.1, 0.2], lambda _: NAN)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"alphas": []}, ValueError, "alphas must hold at least one value"),
        ({"alphas": 0.5}, TypeError, "alphas must be a list of values, got float"),
        ({"alphas": torch.tensor(0.5)}, TypeError, "alphas must be a list of values, got Tensor"),
        ({"alphas": [0.5, NAN]}, ValueError, "alphas[1] must be finite"),
        ({"alphas": [0.5, None]}, TypeError, "alphas[1] must be a number"),
        ({"evaluate": 3}, TypeError, "evaluate must be callable, got int"),
        ({"maximize": 1}, TypeError, "maximize must be True or False"),
        ({"progress": "yes"}, TypeError, "progress must be"),
        ({"source": nn.Linear(3, 4)}, ValueError, "source['weight'] has shape [4, 3]"),
        ({"source": nn.ReLU()}, ValueError, "source must have the names"),
        ({"source": [torch.ones(2)]}, TypeError, "source must be"),
        ({"source_scale": NAN}, ValueError, "source_scale"),
        ({"target": 3}, TypeError, "target must be"),
    ],
)
def test_errors_before_any_evaluation(change, error, words):
    arguments = {"target": nn.Linear(3, 2), "source": nn.Linear(3, 2), "alphas": [0.5]}
    arguments |= {"evaluate": lambda m: pytest.fail("evaluated")} | change
    with pytest.raises(error, match=re.escape(words)):
        sweep_alpha(**arguments)


@pytest.mark.parametrize("score", [None, "0.5", torch.ones(2), torch.tensor(1j)])
def test_scores_that_are_no_numbers(score):
    with pytest.raises(TypeError, match="evaluate must return a number or a one-element tensor, got"):
        sweep_alpha(torch.ones(2), torch.ones(2), [0.5], lambda _: score)


# --------------------------------------------------------------------------------------------------- kfold_search


# CPython closes a generator that nobody refers to: with these, only kfold_search does.
ALIVE = []


def scripted(scores, log=None):
    """A fit that yields, for each value, the rows of a table [rounds][folds]; the fold is known by its order."""
    started: dict[object, int] = {}

    def fit(value, train, validation):
        fold = started.get(value, 0)
        started[value] = fold + 1
        ALIVE.append(play(value, fold))
        return ALIVE[-1]

    def play(value, fold):
        try:
            for i, row in enumerate(scores[value]):
                if fold < len(row):
                    if log is not None:
                        log.append((value, i, fold))
                    if isinstance(row[fold], Exception):
                        raise row[fold]
                    yield row[fold]
        finally:
            if log is not None:
                log.append((value, "closed", fold))

    return fit


def folds_of(labels, folds, seed=0):
    found = []

    def fit(value, train, validation):
        found.append((train, validation))
        yield 1.0

    kfold_search(fit, ["only"], labels, folds=folds, seed=seed)
    return found


@given(st.lists(st.integers(-2, 3), min_size=2, max_size=40), st.integers(2, 6), st.integers(0, 5))
def test_folds(labels, folds, seed):
    """Disjoint, complete, sorted, of equal sizes, stratified, and decided by the seed."""
    labels = torch.tensor(labels)
    folds = min(folds, len(labels))
    splits = folds_of(labels, folds, seed)
    assert len(splits) == folds
    everything = torch.arange(len(labels))
    assert torch.equal(torch.cat([v for _, v in splits]).sort().values, everything)
    for train, validation in splits:
        assert train.dtype == validation.dtype == torch.int64
        assert torch.equal(torch.cat([train, validation]).sort().values, everything)
        assert torch.equal(train, train.sort().values)
        assert torch.equal(validation, validation.sort().values)
    sizes = [len(v) for _, v in splits]
    assert max(sizes) - min(sizes) <= 1
    for c in labels.unique():
        counts = [int((labels[v] == c).sum()) for _, v in splits]
        assert max(counts) - min(counts) <= 1
    for (_, a), (_, b) in zip(splits, folds_of(labels, folds, seed), strict=True):
        assert torch.equal(a, b)


def test_folds_are_shuffled_by_the_seed_alone():
    state = torch.get_rng_state()
    a, b, c = folds_of(30, 3), folds_of(30, 3), folds_of(30, 3, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a[0][1], b[0][1])
    assert not torch.equal(a[0][1], c[0][1])
    assert not torch.equal(a[0][1], torch.arange(0, 30, 3))  # not merely dealt
    stratified = folds_of(torch.arange(30) % 2 == 0, 3)
    assert all((v % 2 == 0).sum() == 5 for _, v in stratified)


def test_all_values_have_the_same_folds_whatever_a_fit_does_to_them():
    found = {}

    def fit(value, train, validation):
        found.setdefault(value, []).append((train.clone(), validation.clone()))
        train.zero_()
        validation.zero_()
        yield 1.0

    kfold_search(fit, [1, 2], 10, folds=2)
    for a, b in zip(found[1], found[2], strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_folds_advance_in_step_and_stop_on_the_mean():
    """The mean peaks in round 2, where fold 0 is past its best and fold 1 before it."""
    log = []
    scores = {"v": [[0.5, 0.1], [0.4, 0.6], [0.3, 0.6], [0.2, 0.8], [0.1, 0.7], [9.0, 9.0]]}
    found = kfold_search(scripted(scores, log), ["v"], 4, folds=2, patience=3)
    assert log[:10] == [("v", i, fold) for i in range(5) for fold in range(2)]
    assert sorted(log[10:]) == [("v", "closed", 0), ("v", "closed", 1)]
    assert found.best == "v"
    assert found.rounds == 2
    assert found.score == 0.5
    assert found.values == ["v"]
    assert found.curves == [pytest.approx([0.3, 0.5, 0.45, 0.5, 0.4])]
    assert found.fold_scores == [scores["v"][:5]]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("patience, rounds, best", [(1, 2, 1), (2, 5, 3), (3, 6, 6)])
def test_patience(patience, rounds, best, sign):
    """Improvements in rounds 1, 3 and 6 (an equal score is none); patience counts from the last."""
    curve = [sign * s for s in (1.0, 1.0, 2.0, 2.0, 1.0, 3.0)]
    fit = scripted({"v": [[s, s] for s in curve]})
    found = kfold_search(fit, ["v"], 4, folds=2, patience=patience, maximize=sign > 0)
    assert found.curves == [curve[:rounds]]
    assert found.rounds == best


def test_a_fit_that_never_ends():
    def fit(value, train, validation):
        while True:
            yield 0.0

    found = kfold_search(fit, [1], 4, folds=2, patience=7)
    assert len(found.curves[0]) == 8
    assert found.rounds == 1


def test_the_shortest_fold_counts():
    log = []
    found = kfold_search(scripted({"v": [[1.0, 1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]}, log), ["v"], 6, folds=3)
    assert found.fold_scores == [[[1.0, 1.0, 1.0]]]
    assert found.rounds == 1
    assert sum(entry[1] == "closed" for entry in log) == 3


@pytest.mark.parametrize("maximize, best, rounds, score", [(True, "b", 2, 5.0), (False, "c", 3, 0.5)])
def test_the_best_value_and_the_first_of_equal_ones(maximize, best, rounds, score):
    curves = {"a": [1.0, 2.0, 4.0], "b": [3.0, 5.0, 1.0], "c": [5.0, 1.0, 0.5], "d": [5.0, 0.5, 0.5]}
    scores = {name: [[s, s] for s in curve] for name, curve in curves.items()}
    found = kfold_search(scripted(scores), list(curves), 4, folds=2, maximize=maximize)
    assert (found.best, found.rounds, found.score) == (best, rounds, score)
    assert found.curves == list(curves.values())


def test_nan_never_wins_and_uses_up_patience():
    scores = {
        "nan": [[NAN, 9.0]] * 5,
        "late": [[NAN, 9.0], [NAN, 9.0], [1.0, 1.0], [2.0, NAN], [0.0, 0.0]],
        "low": [[-INF, -INF]],
    }
    found = kfold_search(scripted(scores), ["nan", "low", "late"], 4, folds=2)
    assert (found.best, found.rounds, found.score) == ("late", 3, 1.0)
    assert [len(curve) for curve in found.curves] == [3, 1, 5]
    assert kfold_search(scripted(scores), ["nan", "low"], 4, folds=2).best == "low"
    with pytest.raises(ValueError, match="NaN for every value"):
        kfold_search(scripted(scores), ["nan"], 4, folds=2)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_exception_of_a_fit_is_passed_on_and_all_are_closed(failing):
    log = []
    second = [RuntimeError("out of memory") if fold == failing else 2.0 for fold in range(3)]
    with pytest.raises(RuntimeError, match="out of memory"):
        kfold_search(scripted({"v": [[1.0] * 3, second]}, log), ["v"], 6, folds=3)
    assert sorted(entry for entry in log if entry[1] == "closed") == [
        ("v", "closed", fold) for fold in range(3)
    ]


def test_a_fit_may_yield_without_gradients():
    """The folds run in turn: what one has switched off may not stay off for the others."""

    def fit(value, train, validation):
        for _ in range(2):
            assert torch.is_grad_enabled()
            with torch.no_grad():
                yield 1.0
        yield 1.0

    kfold_search(fit, [1, 2], 4, folds=2)
    assert torch.is_grad_enabled()


def test_a_fit_may_yield_in_inference_mode():
    def fit(value, train, validation):
        w = torch.zeros((), requires_grad=True)
        while value:
            (w - value).square().backward()
            w.data -= 0.1 * w.grad
            with torch.inference_mode():
                yield -(w - value).abs()
            value -= 1

    assert len(kfold_search(fit, [3, 1], 4, folds=2).curves[0]) == 3
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_a_fit_that_yields_inside_of_autocast():
    def fit(value, train, validation):
        with torch.autocast("cpu"):
            yield value

    with pytest.raises(ValueError, match=r"fit must not yield inside of torch\.autocast"):
        kfold_search(fit, [1.0], 6)
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu"):
        assert kfold_search(fit, [1.0], 6).best == 1.0


def test_an_iterator_need_not_be_a_generator():
    found = kfold_search(lambda value, train, validation: iter([value, torch.tensor([value])]), [1, 3, 2], 6)
    assert (found.best, found.rounds, found.score) == (3, 1, 3.0)


def test_values_that_cannot_be_hashed():
    found = kfold_search(lambda value, *_: iter([value["lr"]]), [{"lr": 0.1}, {"lr": 0.2}], 6)
    assert found.best == {"lr": 0.2}
    assert kfold_search(lambda value, *_: iter([value]), torch.tensor([2.0, 1.0]), 6).best == 2.0


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_values_that_compare_by_element(make):
    values = [make([1.0, 2.0]), make([3.0, 2.0])]
    assert kfold_search(lambda value, *_: iter([value[0]]), values, 6).best is values[1]
    with pytest.raises(ValueError, match="values must differ"):
        kfold_search(lambda value, *_: iter([value[0]]), [*values, values[0]], 6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.bool])
def test_labels_of_any_integer_dtype(dtype):
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    for (_, a), (_, b) in zip(folds_of(labels.to(dtype), 3), folds_of(labels, 3), strict=True):
        assert torch.equal(a, b)


def test_the_strength_of_a_ridge_by_leave_one_out():
    """Against the closed form of leave-one-out: the residuals over 1 - leverage (Allen's PRESS, 1974)."""
    x, noise = torch.randn(12, 6, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
    y = x @ torch.full((6, 1), 0.3, dtype=torch.float64) + noise

    def fit(strength, train, validation):
        layer = LinearMap(6, 1, False, dtype=torch.float64).fit(x[train], y[train], ridge=strength)
        yield F.mse_loss(layer(x[validation]), y[validation])

    strengths = [1000.0, 100.0, 10.0, 1.0, 0.1, 0.0]
    found = kfold_search(fit, strengths, 12, folds=12, maximize=False)
    press = []
    for strength in strengths:
        hat = x @ torch.linalg.solve(x.T @ x + strength * torch.eye(6, dtype=x.dtype), x.T)
        press.append(((y - hat @ y)[:, 0] / (1 - hat.diagonal())).square().mean().item())
    assert [c[0] for c in found.curves] == pytest.approx(press)
    assert found.best == strengths[press.index(min(press))]
    assert found.best not in (strengths[0], strengths[-1])


def test_the_example_of_the_documentation():
    """Few labels: what was learned before generalises, what fits these labels does not."""
    pretrained = nn.Linear(30, 2)
    x = torch.randn(40, 30)
    y = pretrained(x).argmax(1)
    y[:8] = 1 - y[:8]  # wrong labels

    def fit(strength, train, validation):
        torch.manual_seed(0)
        model = copy.deepcopy(pretrained)
        reg = L2SP(model, strength)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        while True:
            for batch in train[torch.randperm(len(train))].split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                reg.add_grad_()
                optimizer.step()
            with torch.no_grad():
                accuracy = (model(x[validation]).argmax(1) == y[validation]).float().mean()
            yield accuracy

    found = kfold_search(fit, [0.5, 0.1, 0.0], y)
    again = kfold_search(fit, [0.5, 0.1, 0.0], y)
    assert found == again
    assert found.best == 0.5
    assert found.score == max(map(max, found.curves))
    assert all(len(curve) >= 4 for curve in found.curves)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"values": []}, ValueError, "values must hold at least one value"),
        ({"values": 0.5}, TypeError, "values must be a list of values, got float"),
        ({"values": "abc"}, TypeError, "values must be a list of values, got str"),
        ({"values": [1, 2, 1.0]}, ValueError, "values must differ, got 1.0 twice"),
        ({"labels": torch.rand(6)}, TypeError, "labels must be integers, got float32"),
        ({"labels": torch.ones(6, 1).long()}, ValueError, "labels must be [N], got [6, 1]"),
        ({"labels": [0, 1, 0, 1]}, TypeError, "labels must be an integer tensor or the number of samples"),
        ({"labels": True}, TypeError, "labels must be"),
        ({"labels": 0}, ValueError, "folds must be at most the number of samples, 0"),
        ({"folds": 1}, ValueError, "folds must be at least 2, got 1"),
        ({"folds": 7}, ValueError, "folds must be at most the number of samples, 6, got 7"),
        ({"folds": 2.0}, TypeError, "folds must be an integer"),
        ({"patience": 0}, ValueError, "patience must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"seed": None}, TypeError, "seed must be an integer"),
        ({"maximize": "min"}, TypeError, "maximize must be True or False"),
        ({"progress": 1}, TypeError, "progress must be"),
        ({"fit": None}, TypeError, "fit must be a generator function, got NoneType"),
    ],
)
def test_errors_before_any_fit(change, error, words):
    arguments = {"fit": lambda *_: pytest.fail("fitted"), "values": [1.0, 2.0], "labels": 6} | change
    with pytest.raises(error, match=re.escape(words)):
        kfold_search(**arguments)


@pytest.mark.parametrize(
    "fit, error, words",
    [
        (
            lambda *_: 0.5,
            TypeError,
            "fit must be a generator function (one that yields its scores), it returned float",
        ),
        (lambda *_: [0.5], TypeError, "it returned list"),
        (lambda *_: iter([]), ValueError, "fit must yield at least one score, a fold of the value 1.0"),
        (lambda *_: iter([None]), TypeError, "fit must yield a number or a one-element tensor, got NoneType"),
        (lambda *_: iter([torch.ones(2)]), TypeError, "got a tensor of shape [2]"),
    ],
)
def test_errors_of_a_fit(fit, error, words):
    with pytest.raises(error, match=re.escape(words)):
        kfold_search(fit, [1.0, 2.0], 6)
