"""Blending by name: dicts and modules, alpha and transforms by pattern, buffers, tied weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fasttransfer import LinearMap, blend, blend_, blend_many, blend_many_
from tests import oracle
from tests.nets import Net, move, tied


def ones(*shape):
    return torch.ones(shape)


def zeros(*shape):
    return torch.zeros(shape)


def tensors(value):
    """Parameters and buffers by name, detached copies."""
    named = value.state_dict() if isinstance(value, nn.Module) else value
    return {name: t.detach().clone() for name, t in named.items()}


def assert_blended(out, target, source, alpha):
    """All floating entries; what is an integer is the target's."""
    assert list(out) == list(target)
    for name, t in target.items():
        if t.dtype.is_floating_point:
            oracle.assert_one_rounding(
                out[name].detach(), *oracle.blend(t, [source[name]], alpha, None, [1.0])
            )
        else:
            assert torch.equal(out[name], t)


@pytest.fixture
def models():
    """Two models with different weights, statistics and counters (20 and 3)."""
    pair = Net(), Net()
    for model, batches in zip(pair, (20, 3), strict=True):
        for _ in range(batches):
            model(torch.randn(8, 4))
    return pair


# ----------------------------------------------------------------------------------------------- forms and names


def test_modules_state_dicts_and_dicts(backend, models):
    target, source = map(tensors, models)
    reordered = dict(reversed(source.items()))
    for t, s in [(*models,), (target, source), (target, reordered), (models[0], source), (target, models[1])]:
        out = blend(t, s, 0.3)
        assert isinstance(out, dict)
        out = {name: out[name] for name in target}  # a module's parameters come before its buffers
        assert_blended(out, target, source, 0.3)
    returned = blend_(models[0], reordered, 0.3)
    assert returned is models[0]
    assert_blended(tensors(models[0]), target, source, 0.3)
    assert_blended(blend_(tensors(target), source, 0.3), target, source, 0.3)
    assert all(torch.equal(models[1].state_dict()[name], t) for name, t in source.items())


def test_in_place_on_a_state_dict_reaches_the_module(backend, models):
    before, source = map(tensors, models)
    state = models[0].state_dict()
    assert blend_(state, source, 0.3) is state
    assert_blended(tensors(models[0]), before, source, 0.3)


def test_a_list_is_returned_for_lists_tuples_and_generators(backend):
    target, source = nn.Linear(2, 3), nn.Linear(2, 3)
    expected = list(blend(target, source, 0.3).values())
    for make in (lambda m: list(m.parameters()), lambda m: tuple(m.parameters()), lambda m: m.parameters()):
        out = blend(make(target), make(source), 0.3)
        assert isinstance(out, list)
        assert all(torch.equal(a, b) for a, b in zip(expected, out, strict=True))
    generator = target.parameters()
    assert blend_(generator, source.parameters(), 0.3) is generator
    assert torch.equal(target.weight, expected[0])


def test_a_bf16_model_and_its_fp32_average(backend):
    model, average = Net().bfloat16(), Net()
    target, source = tensors(average), tensors(model)
    blend_(average, model, 0.9)
    assert average.head.weight.dtype == torch.float32
    assert_blended(tensors(average), target, source, 0.9)
    target = tensors(average)
    blend_(model, average, 0.1)  # one rounding to bf16
    assert model.head.weight.dtype == torch.bfloat16
    assert_blended(tensors(model), source, target, 0.1)


def test_soup_of_models(backend):
    nets = [Net() for _ in range(4)]
    states = [tensors(net) for net in nets]
    weights = [0.5, 0.75, -0.25]
    out = blend_many(nets[0], nets[1:], 0.25, weights=weights)
    for name, t in out.items():
        rows = [state[name] for state in states]
        if t.dtype.is_floating_point:
            oracle.assert_one_rounding(t.detach(), *oracle.blend(rows[0], rows[1:], 0.25, None, weights))
    blend_many_(nets[0], nets[1:], 0.25, weights=weights)
    assert all(torch.equal(t, out[name]) for name, t in nets[0].state_dict().items())


def test_recurrent_models(backend):
    pair = [nn.GRU(3, 4, num_layers=2, bidirectional=True) for _ in range(2)]
    target, source = map(tensors, pair)
    blend_(*pair, 0.3)
    assert_blended(tensors(pair[0]), target, source, 0.3)
    pair[0](torch.randn(5, 2, 3))


def test_empty_models_and_dicts(backend):
    assert blend(nn.ReLU(), nn.ReLU(), 0.5) == {}
    assert blend({}, {}, torch.tensor(0.5)) == {}
    assert blend({}, {}, 0.5, source_scale=torch.tensor(1.0)) == {}
    empty = nn.ReLU()
    assert blend_(empty, nn.ReLU(), 0.5) is empty
    only = blend({"n": torch.tensor(3)}, {"n": torch.tensor(5)}, torch.tensor(0.5))
    assert only["n"].item() == 3


# ------------------------------------------------------------------------------------------ alpha and transform


def test_alpha_by_pattern_the_first_match_wins(backend, models):
    target, source = map(tensors, models)
    alpha = {"head.bias": 0.0, "head.*": torch.tensor(0.25), "*.weight": 1.0, "*": np.float32(0.5)}
    scale = {"head.weight": 2.0, "*": 1.0}
    expected = {"head.bias": 0.0, "head.weight": 0.25, "backbone.0.weight": 1.0, "backbone.0.bias": 0.5}
    out, scaled = blend(*models, alpha), blend(*models, alpha, source_scale=scale)
    for name, a in expected.items():
        t, s = target[name], source[name]
        oracle.assert_one_rounding(out[name].detach(), *oracle.blend(t, [s], a, None, [1.0]))
        b = 2.0 if name == "head.weight" else 1.0
        oracle.assert_one_rounding(scaled[name].detach(), *oracle.blend(t, [s], a, b, [1.0]))
    blend_(*models, alpha)
    assert torch.equal(models[0].head.weight, out["head.weight"])


def test_patterns_over_all_names(backend, models):
    """Also those of integers and of buffers that are kept: they are there, so the pattern is no typing error."""
    blend(*models, {"*.num_batches_tracked": 1.0, "*": 0.5})
    blend_(*models, {"*.running_*": 0.9, "*": 0.5}, buffers="keep")
    assert blend({"a[0]": ones(2)}, {"a[0]": zeros(2)}, {"a[0]": 0.5})["a[0]"].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "alpha, words",
    [
        ({"head.*": 0.5}, ["alpha", "backbone.0.weight", "*"]),
        ({"heads.*": 0.5, "*": 0.5}, ["alpha", "'heads.*'", "matches none"]),
        ({}, ["alpha"]),
    ],
)
def test_patterns_that_leave_a_name_out_or_match_nothing(models, alpha, words):
    before = tensors(models[0])
    for call in (blend, blend_):
        with pytest.raises(ValueError) as caught:
            call(*models, alpha)
        assert all(word in str(caught.value) for word in words), caught.value
    assert all(torch.equal(t, before[name]) for name, t in models[0].state_dict().items())


def test_transform_as_matrix_module_function_and_mapping(backend):
    close = torch.testing.assert_close  # one GEMM, or a product and then a blend
    t, s, matrix = torch.randn(3, 4), torch.randn(3, 6), torch.randn(4, 6)
    linear = nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(matrix)
    mapped = torch.nn.functional.linear(s, matrix)
    expected = blend(t, mapped, 0.3)
    for transform in (matrix, linear, lambda x: x @ matrix.T):
        close(blend(t, s, 0.3, transform=transform), expected)
        close(blend_(t.clone(), s, 0.3, transform=transform), expected)
        close(blend([t], [s], 0.3, transform=transform)[0], expected)
    named = blend({"a": t, "b": t}, {"a": s, "b": t + 1}, 0.3, transform={"a": matrix})
    close(named["a"], expected)
    assert torch.equal(named["b"], blend(t, t + 1, 0.3))
    twice = blend({"a": t, "b": t}, {"a": s, "b": s}, 0.3, transform={"a": linear, "*": matrix})
    assert torch.equal(twice["a"], twice["b"])


def test_products_are_blended_by_their_gemm(backend):
    """Forward, in place and all gradients are those of the two steps; alpha 0, a bias, a source without rows."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        t, s = torch.randn(2, 3, 4).to(dtype), torch.randn(2, 3, 6).to(dtype)
        layer = LinearMap(6, 4, dtype=dtype)
        bound = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
        for alpha, scale in ((0.3, None), (0.0, None), (1.0, 1.0), (-0.5, 2.0)):
            leaves = [x.clone().requires_grad_() for x in (t, s)]
            parameters = list(layer.parameters())
            out = blend(*leaves, alpha, source_scale=scale, transform=layer)
            b = 1 - alpha if scale is None else scale
            expected = alpha * leaves[0] + b * layer(leaves[1])
            torch.testing.assert_close(out, expected, **bound)
            upstream = torch.randn_like(out)
            for x, y in zip(
                torch.autograd.grad(out, [*leaves, *parameters], upstream),
                torch.autograd.grad(expected, [*leaves, *parameters], upstream),
                strict=True,
            ):
                torch.testing.assert_close(x, y, **bound)
            inplace = t.clone()
            assert blend_(inplace, s, alpha, source_scale=scale, transform=layer) is inplace
            torch.testing.assert_close(inplace, expected.detach(), **bound)
    assert blend(torch.zeros(0, 4), torch.zeros(0, 6), 0.3, transform=torch.zeros(4, 6)).shape == (0, 4)
    square, matrix = torch.randn(4, 4), torch.randn(4, 4)
    for own in (square, matrix):  # a target that is also what it is computed from
        expected = 0.3 * own + 0.7 * square @ matrix.T
        source, transform = (own, matrix) if own is square else (square, own)
        torch.testing.assert_close(blend_(own, source, 0.3, transform=transform), expected)
        square = torch.randn(4, 4)


def test_transform_of_a_smaller_model_into_a_larger_one(backend):
    target, source = nn.Linear(6, 3), nn.Linear(4, 3)
    widen = torch.randn(6, 4)
    out = blend(target, source, 0.0, transform={"weight": widen})
    torch.testing.assert_close(out["weight"], source.weight @ widen.T)
    assert torch.equal(out["bias"], source.bias)


def test_transform_in_another_precision(backend):
    """In the wider of the two."""
    matrix = 1 + 2.0**-12 * torch.arange(6.0).view(2, 3)
    out = blend(zeros(2), ones(3).bfloat16(), 0.0, transform=matrix)
    assert torch.equal(out, matrix.sum(1))
    out = blend(ones(2).bfloat16(), ones(3).double(), 0.0, transform=matrix.bfloat16())
    assert out.tolist() == [3, 3]
    assert out.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------ buffers


BN = "backbone.1.0."


def test_integers_are_never_averaged(backend, models):
    assert blend(*models, 0.5)[BN + "num_batches_tracked"].item() == 20
    assert blend(*map(tensors, models), 0.5)[BN + "num_batches_tracked"].item() == 20
    assert blend_many(models[0], [models[1], models[1]], 0.5)[BN + "num_batches_tracked"].item() == 20


@pytest.mark.parametrize("policy, counter", [("blend", 20), ("copy", 3), ("keep", 20)])
def test_policies(backend, models, policy, counter):
    target, source = map(tensors, models)
    blend_(*models, 0.25, buffers=policy)
    out = tensors(models[0])
    assert out[BN + "num_batches_tracked"].item() == counter
    for name in ("running_mean", "running_var"):
        expected = {
            "blend": blend(target[BN + name], source[BN + name], 0.25),
            "copy": source[BN + name],
            "keep": target[BN + name],
        }[policy]
        assert torch.equal(out[BN + name], expected)
    assert torch.equal(out["head.weight"], blend(target["head.weight"], source["head.weight"], 0.25))


def test_policies_for_a_dict_are_about_integers(backend, models):
    """A dict does not say what is a buffer: its floating entries are blended."""
    target, source = map(tensors, models)
    for policy, counter in [("blend", 20), ("copy", 3), ("keep", 20)]:
        out = blend_(tensors(target), source, 0.25, buffers=policy)
        assert out[BN + "num_batches_tracked"].item() == counter
        assert torch.equal(
            out[BN + "running_mean"], blend(target[BN + "running_mean"], source[BN + "running_mean"], 0.25)
        )


def test_copy_with_several_sources_is_refused(models):
    with pytest.raises(ValueError, match="buffers='copy' needs a single source"):
        blend_many_(models[0], [models[1], models[1]], 0.5, buffers="copy")


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("names", [["weight", "bias"], ["*"]])
def test_copied_buffers_of_another_shape(size, names):
    """Refused, not broadcast, and before anything is written. A copy is not transformed."""
    target, source = nn.BatchNorm1d(4), nn.BatchNorm1d(size)
    source.num_batches_tracked.fill_(7)
    source.running_mean.fill_(7)
    before = tensors(target)
    with pytest.raises(ValueError, match=rf"\[{size}\].*\[4\]"):
        blend_(target, source, 0.5, transform=dict.fromkeys(names, lambda w: ones(4)), buffers="copy")
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())


def test_a_copy_does_not_truncate():
    target = {"n": torch.tensor([1, 1])}
    with pytest.raises((TypeError, ValueError), match="'n'"):
        blend_(target, {"n": torch.tensor([0.7, 0.7])}, 0.5, buffers="copy")
    assert target["n"].tolist() == [1, 1]


class Cached(nn.Module):
    """A persistent buffer, one that is not (derived state), and one that is None."""

    def __init__(self, value):
        super().__init__()
        self.w = nn.Parameter(torch.full((2,), value))
        self.register_buffer("kept", torch.full((2,), value))
        self.register_buffer("derived", torch.full((2,), value), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, x):
        return x * self.w + self.kept + self.derived


@pytest.mark.parametrize("policy", ["blend", "copy"])
def test_buffers_that_are_not_persistent_are_left_alone(backend, policy):
    target, source = Cached(1.0), Cached(0.0)
    assert list(blend(target, source, 0.5)) == ["w", "kept"]
    blend_(target, source, 0.5, buffers=policy)
    assert target.derived.tolist() == [1.0, 1.0]
    assert target.kept.tolist() == ([0.5, 0.5] if policy == "blend" else [0.0, 0.0])


# ---------------------------------------------------------------------------------------------- functional_call


def test_functional_call(backend):
    target, source = Cached(1.0), Cached(0.0)
    alpha = torch.tensor(0.25, requires_grad=True)
    blended = blend(target, source, alpha)
    assert not blended["kept"].requires_grad  # a buffer is no parameter: see the test below
    out = torch.func.functional_call(target, blended, (torch.ones(2),))
    assert out.tolist() == [1.5, 1.5]
    out.sum().backward()
    assert alpha.grad.item() == 2
    assert target.w.grad.tolist() == [0.25, 0.25]


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_with_batch_norm(backend, models, training):
    """Its running statistics may not require grad, whatever else does."""
    target, source = (model.train(training) for model in models)
    alpha = torch.tensor(0.25, requires_grad=True)
    expected = copy.deepcopy(target)
    blend_(expected, source, 0.25)
    x = torch.randn(8, 4)
    out = torch.func.functional_call(target, blend(target, source, alpha), (x,))
    torch.testing.assert_close(out, expected(x))
    out.square().sum().backward()
    assert alpha.grad.item() != 0
    assert all(p.grad is not None for p in (*target.parameters(), *source.parameters()))


def test_functional_call_with_tied_weights(backend):
    target, source = tied(), tied()
    out = torch.func.functional_call(target, blend(target, source, 0.5), (torch.tensor([1, 2]),))
    twin = copy.deepcopy(target)
    blend_(twin, source, 0.5)
    assert torch.equal(out, twin(torch.tensor([1, 2])))


# ------------------------------------------------------------------------------------------------- tied weights


def test_tied_weights_are_blended_once(backend):
    pair = tied(), tied()
    expected = blend(pair[0][0].weight, pair[1][0].weight, 0.5).detach()
    for target in (copy.deepcopy(pair[0]), copy.deepcopy(pair[0]).state_dict()):
        for source in (pair[1], pair[1].state_dict()):
            twin = copy.deepcopy(target)
            blend_(twin, source, 0.5)
            state = twin.state_dict() if isinstance(twin, nn.Module) else twin
            assert torch.equal(state["0.weight"], expected)
            assert torch.equal(state["1.weight"], expected)


def test_a_tied_source_for_an_untied_target(backend):
    target = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    source = tied()
    blend_(target, source, 0.0)
    assert torch.equal(target[0].weight, source[0].weight)
    assert torch.equal(target[1].weight, source[0].weight)


@pytest.mark.parametrize("as_dict", [False, True], ids=["modules", "state_dicts"])
def test_an_untied_source_for_a_tied_target_is_refused(as_dict):
    """One of its two weights would be lost."""
    target, source = tied(), nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    before = target[0].weight.detach().clone()
    pair = (target.state_dict(), source.state_dict()) if as_dict else (target, source)
    with pytest.raises(ValueError, match=r"0\.weight.*1\.weight"):
        blend_(*pair, 0.5)
    assert torch.equal(target[0].weight, before)


def test_patterns_find_a_tied_weight_under_either_name(backend):
    target, source = tied(), tied()
    for name in ("0.weight", "1.weight"):
        out = blend(target, source, {name: 0.25})
        assert torch.equal(out["0.weight"], blend(target[0].weight, source[0].weight, 0.25))


def test_one_memory_with_two_alphas_is_refused():
    w, source = ones(3), zeros(3)
    with pytest.raises(ValueError, match=r"'a'.*'b'"):
        blend_({"a": w, "b": w}, {"a": source, "b": source}, {"a": 0.9, "b": 0.1})
    assert w.tolist() == [1, 1, 1]


def test_tied_entries_of_a_dict_beside_others_with_an_alpha_of_their_own(backend):
    w, v = ones(3), ones(2)
    target = {"a": w, "b": w, "c": v}
    shared = zeros(3)
    alpha = {"c": torch.tensor(0.25), "*": torch.tensor(0.5)}
    scale = {"c": torch.tensor(1.0), "*": torch.tensor(2.0)}
    blend_(target, {"a": shared, "b": shared, "c": ones(2)}, alpha, source_scale=scale)
    assert (w.tolist(), v.tolist()) == ([0.5] * 3, [1.25] * 2)


def test_moved_models_stay_models(backend):
    """A round through an optimizer step: parameters are the same objects, still leaves."""
    model, average = Net(), Net()
    parameters = list(model.parameters())
    blend_(average, model, 0.9)
    blend_(model, average, 0.5)
    move(model)
    assert all(p is q and p.is_leaf for p, q in zip(parameters, model.parameters(), strict=True))
