"""Each error of blend, blend_, blend_many and blend_many_, and that a call that raises has modified nothing."""

import numpy as np
import pytest
import torch
from torch import nn

from fasttransfer import blend, blend_, blend_many, blend_many_


def ones(*shape):
    return torch.ones(shape)


CALLS = {
    "blend": blend,
    "blend_": blend_,
    "blend_many": lambda target, source, alpha: blend_many(target, [source], alpha),
    "blend_many_": lambda target, source, alpha: blend_many_(target, [source], alpha),
}


@pytest.fixture(params=CALLS, ids=str)
def call(request):
    return CALLS[request.param]


def raises(kind, words, call, *args, **options):
    with pytest.raises(kind) as caught:
        call(*args, **options)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    "target, source, kind, words",
    [
        (ones(4, 4), ones(1, 4), ValueError, ["source", "[1, 4]", "[4, 4]"]),
        (ones(1, 4), ones(4, 4), ValueError, ["source", "[1, 4]", "[4, 4]"]),
        (ones(), ones(1), ValueError, ["source", "[1]", "[]"]),
        (ones(2, 3), ones(3, 2), ValueError, ["source", "[3, 2]", "[2, 3]"]),
        ([ones(2), ones(3)], [ones(2), ones(4)], ValueError, ["source[1]", "target[1]", "[4]", "[3]"]),
        ([ones(2)], [ones(2), ones(2)], ValueError, ["as many", "1", "2"]),
        ({"a.b": ones(2)}, {"a.b": ones(3)}, ValueError, ["a.b", "[2]", "[3]"]),
        ({"a": ones(2), "b": ones(2)}, {"a": ones(2)}, ValueError, ["source", "lacks 'b'"]),
        ({"a": ones(2)}, {"a": ones(2), "b": ones(2)}, ValueError, ["source", "'b'"]),
        ({"a": ones(2)}, {"module.a": ones(2)}, ValueError, ["'a'", "'module.a'"]),
        (nn.Linear(2, 2), nn.Linear(2, 3), ValueError, ["weight", "[3, 2]", "[2, 2]"]),
        (nn.Linear(2, 2), nn.Linear(2, 2, bias=False), ValueError, ["source", "lacks 'bias'"]),
        (nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False), ValueError, ["running_mean"]),
        (ones(2), [ones(2)], TypeError, ["source", "a tensor", "list"]),
        ([ones(2)], {"a": ones(2)}, TypeError, ["source", "list", "dict"]),
        ([ones(2)], ones(1, 2), TypeError, ["source", "list", "a tensor"]),
        (torch.tensor([1, 2]), torch.tensor([3, 4]), TypeError, ["target", "int64"]),
        ([torch.tensor([True])], [torch.tensor([True])], TypeError, ["target[0]", "bool"]),
        (ones(2), torch.tensor([3, 4]), TypeError, ["source", "int64"]),
        ({"a": ones(2)}, {"a": torch.tensor([3, 4])}, TypeError, ["source['a']", "int64"]),
        (ones(2).cfloat(), ones(2).cfloat(), TypeError, ["target", "complex64"]),
        ({"c": ones(2).cfloat()}, {"c": ones(2).cfloat()}, TypeError, ["target['c']", "complex64"]),
        (ones(2).to_sparse(), ones(2), TypeError, ["target", "sparse"]),
        (ones(2), ones(2).to_sparse(), TypeError, ["source", "sparse"]),
        (ones(2).to(torch.float8_e4m3fn), ones(2), TypeError, ["target", "float8"]),
        (ones(2), ones(2).to("meta"), ValueError, ["source", "meta", "cpu"]),
        ("ab", "ab", TypeError, ["target", "str"]),
        (1.0, 2.0, TypeError, ["target", "float"]),
        (np.ones(2), np.ones(2), TypeError, ["target"]),
        ([[ones(2)]], [[ones(2)]], TypeError, ["target[0]", "list"]),
        ({"a": {"b": ones(2)}}, {"a": {"b": ones(2)}}, TypeError, ["target['a']", "dict"]),
        ({0: ones(2)}, {0: ones(2)}, TypeError, ["target", "0"]),
    ],
)
def test_target_and_source_that_do_not_fit(call, target, source, kind, words):
    if call in (CALLS["blend_many"], CALLS["blend_many_"]):
        words = [word for word in words if not word.startswith("source")]
    raises(kind, words, call, target, source, 0.5)


@pytest.mark.parametrize(
    "alpha", ["0.5", None, True, [0.5], np.array(0.5), torch.tensor(1), ones(2), ones(0)], ids=repr
)
def test_alpha_that_is_no_number(call, alpha):
    raises((TypeError, ValueError), ["alpha"], call, [ones(2)], [ones(2)], alpha)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), -float("inf"), 10**400], ids=repr)
def test_alpha_that_is_not_finite(call, alpha):
    raises(ValueError, ["alpha", "finite"], call, ones(2), ones(2), alpha)


def test_alpha_by_pattern_needs_names(call):
    raises(TypeError, ["alpha", "names"], call, [ones(2)], [ones(2)], {"*": 0.5})
    raises(TypeError, ["alpha", "names"], call, ones(2), ones(2), {"*": 0.5})


def test_alpha_is_required(call):
    with pytest.raises(TypeError):
        call(ones(2), ones(2))


@pytest.mark.parametrize("function", [blend, blend_], ids=["blend", "blend_"])
@pytest.mark.parametrize(
    "options, kind, words",
    [
        ({"source_scale": "a"}, TypeError, ["source_scale"]),
        ({"source_scale": float("nan")}, ValueError, ["source_scale"]),
        ({"source_scale": {"a": 1.0}}, ValueError, ["source_scale", "'b'"]),
        ({"transform": 3}, TypeError, ["transform", "int"]),
        ({"transform": [ones(2, 2)]}, TypeError, ["transform", "list"]),
        ({"transform": ones(2, 3)}, ValueError, ["transform", "[2, 3]", "[2]"]),
        ({"transform": ones(2)}, ValueError, ["transform", "[2]"]),
        ({"transform": ones(3, 2)}, ValueError, ["[3]", "[2]"]),
        ({"transform": {"c": ones(2, 2)}}, ValueError, ["transform", "'c'", "matches none"]),
        ({"transform": lambda s: None}, TypeError, ["transform", "NoneType"]),
        ({"transform": lambda s: s.int()}, TypeError, ["int32"]),
        ({"transform": lambda s: s[:1]}, ValueError, ["[1]", "[2]", "transformed"]),
    ],
)
def test_options(function, options, kind, words):
    target = {"a": ones(2), "b": ones(2)}
    raises(kind, words, function, target, {"a": torch.zeros(2), "b": torch.zeros(2)}, 0.5, **options)
    assert target["a"].tolist() == target["b"].tolist() == [1, 1]


@pytest.mark.parametrize("policy", ["average", None, True, ["copy"]], ids=repr)
def test_buffers(policy):
    for function, source in ((blend_, nn.BatchNorm1d(2)), (blend_many_, [nn.BatchNorm1d(2)])):
        raises(
            ValueError,
            ["buffers", "'blend'", "'copy'", "'keep'"],
            function,
            nn.BatchNorm1d(2),
            source,
            0.5,
            buffers=policy,
        )


@pytest.mark.parametrize("function", [blend_many, blend_many_], ids=["blend_many", "blend_many_"])
@pytest.mark.parametrize(
    "weights, kind, words",
    [
        ([0.5, 0.6], ValueError, ["weights", "1.1"]),
        ([1.0, -1.0], ValueError, ["weights", "0"]),
        ([1.0], ValueError, ["weights", "2", "1"]),
        ([0.5, 0.25, 0.25], ValueError, ["weights", "2", "3"]),
        ([float("nan"), 1.0], ValueError, ["weights[0]"]),
        ([0.5, float("inf")], ValueError, ["weights[1]"]),
        (["0.5", 0.5], TypeError, ["weights[0]"]),
        (0.5, TypeError, ["weights", "float"]),
        ({"a": 1.0}, TypeError, ["weights"]),
    ],
    ids=repr,
)
def test_weights(function, weights, kind, words):
    target = ones(2)
    raises(kind, words, function, target, [torch.zeros(2)] * 2, 0.5, weights=weights)
    assert target.tolist() == [1, 1]


@pytest.mark.parametrize("function", [blend_many, blend_many_], ids=["blend_many", "blend_many_"])
@pytest.mark.parametrize(
    "sources, kind, words",
    [
        ([], ValueError, ["sources", "at least one"]),
        (ones(2), TypeError, ["sources", "Tensor"]),
        ({"a": ones(2)}, TypeError, ["sources", "dict"]),
        (nn.Linear(2, 2), TypeError, ["sources", "Linear"]),
        (None, TypeError, ["sources", "NoneType"]),
        ([ones(2), ones(3)], ValueError, ["sources[1]", "[3]", "[2]"]),
        ([ones(2), [ones(2)]], TypeError, ["sources[1]", "a tensor"]),
    ],
)
def test_sources(function, sources, kind, words):
    target = ones(2)
    raises(kind, words, function, target, sources, 0.5)
    assert target.tolist() == [1, 1]


def test_an_error_in_the_last_entry_leaves_the_first_unmodified():
    target = {"a": ones(2), "n": torch.tensor(1), "b": ones(2)}
    for source in (
        {"a": torch.zeros(2), "n": torch.tensor(2), "b": torch.zeros(3)},
        {"a": torch.zeros(2), "n": torch.tensor(2), "b": torch.zeros(2).int()},
    ):
        with pytest.raises((TypeError, ValueError), match="'b'"):
            blend_(target, source, 0.5, buffers="copy")
        assert (target["a"].tolist(), target["n"].item(), target["b"].tolist()) == ([1, 1], 1, [1, 1])
        assert (target["a"]._version, target["n"]._version) == (0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": []},
        {"alpha": [0.5]},
        {"scale": [1.0]},
        {"alpha": [], "alpha_tensor": ones(1)},
        {"alpha": [], "alpha_tensor": ones(2).bfloat16()},
        {"scale_tensor": ones(3)},
        {"weights": []},
        {"weights": [0.5, 0.5]},
        {"sources": [ones(2)]},
        {"sources": [ones(2), ones(3)]},
    ],
    ids=repr,
)
def test_the_operator_itself_does_not_read_past_its_lists(one_backend, options):
    """Called directly, without the checks of the public functions."""
    arguments = {
        "targets": [ones(2), ones(2)],
        "sources": [ones(2), ones(2)],
        "alpha": [0.5, 0.5],
        "alpha_tensor": None,
        "scale": [],
        "scale_tensor": None,
        "weights": [1.0],
    }
    for op in (torch.ops.fasttransfer.blend, torch.ops.fasttransfer.blend_):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            op(**{**arguments, **options})


def test_copied_buffers_that_overlap_themselves():
    """Refused before another buffer is written."""

    class Expanded(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.register_buffer("plain", torch.full((2,), value))
            self.register_buffer("expanded", torch.full((1,), value).expand(3))

    target = Expanded(1.0)
    with pytest.raises((RuntimeError, ValueError)):
        blend_(target, Expanded(2.0), 0.5, buffers="copy")
    assert target.plain.tolist() == [1, 1]


@pytest.mark.parametrize("sources", [1, 2])
def test_lists_in_the_usual_layout_are_refused_whole(backend, sources):
    """The way past the general checks: what is wrong with the last pair leaves the first as it was."""
    for wrong in (
        ones(3),
        ones(2).int(),
        ones(2, 1),
        ones(2).to_sparse(),
        "no tensor",
        torch.ones(2, device="meta"),
    ):
        target = [ones(2), ones(2)]
        given = [[torch.zeros(2), wrong]] * sources
        with pytest.raises((ValueError, TypeError)):
            blend_(target, given[0], 0.75) if sources == 1 else blend_many_(target, given, 0.75)
        assert target[0].tolist() == [1, 1]


def test_a_source_that_is_the_next_target_is_refused(backend):
    memory = ones(4)
    target = [memory[:2], memory[2:]]
    for source in ([memory[2:], torch.zeros(2)], [memory[1:3], torch.zeros(2)]):
        with pytest.raises(ValueError, match="overlap"):
            blend_(target, source, 0.75)
    assert memory.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("function", [blend, blend_], ids=["blend", "blend_"])
def test_a_layout_that_has_shape_but_no_strides(backend, function):
    opaque = ones(2).to_mkldnn()
    with pytest.raises(TypeError, match="dense"):
        function(opaque, ones(2).to_mkldnn(), 0.75)
