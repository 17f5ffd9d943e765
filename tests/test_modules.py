"""freeze, thaw and replace_head."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.fx
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn

from fasttransfer import L2SP, freeze, replace_head, thaw
from tests.nets import Net, tied

BACKBONE = [f"backbone.{i}.{kind}" for i in ("0", "1.0", "1.1") for kind in ("weight", "bias")]
HEAD = ["head.weight", "head.bias"]


def trained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def conv_net(norm=nn.BatchNorm2d, **options):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, **options), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def images(n=4):
    return torch.randn(n, 3, 8, 8) * 3 + 1


# ----------------------------------------------------------------------------------------------- which parameters


@pytest.mark.parametrize(
    "options, names",
    [
        ({}, BACKBONE + HEAD),
        ({"include": "backbone"}, BACKBONE),
        ({"include": "backbone.*"}, BACKBONE),
        ({"include": "back*"}, BACKBONE),
        ({"include": ["backbone.1", "head.bias"]}, [*BACKBONE[2:], "head.bias"]),
        ({"include": "*.bias"}, [*BACKBONE[1::2], "head.bias"]),
        ({"exclude": "head"}, BACKBONE),
        ({"exclude": HEAD}, BACKBONE),
        ({"include": "backbone", "exclude": ("backbone.1.?", "*.0.bias")}, BACKBONE[:1]),
        ({"include": []}, []),
    ],
)
def test_patterns(options, names):
    model = Net()
    everything = trained(model)
    assert freeze(model, **options) == names
    assert trained(model) == [name for name in everything if name not in names]
    assert thaw(model, **options) == names
    assert trained(model) == everything


@pytest.mark.parametrize("function", [freeze, thaw])
@pytest.mark.parametrize(
    "options, words",
    [
        ({"include": ["head", "bakbone"]}, ["include", "bakbone", "backbone.0.weight"]),
        ({"exclude": "head.1"}, ["exclude", "head.1"]),
        ({"include": "backbone.1.0.running_mean"}, ["running_mean"]),
        ({"include": "relu"}, ["relu"]),
    ],
)
def test_a_pattern_that_matches_nothing(function, options, words):
    model = Net()
    model.relu = nn.ReLU()
    model.head.requires_grad_(False)
    with pytest.raises(ValueError) as caught:
        function(model, **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert trained(model) == BACKBONE
    assert type(model.backbone[1][0]) is nn.BatchNorm1d


@pytest.mark.parametrize("function", [freeze, thaw])
def test_arguments_of_the_wrong_type(function):
    with pytest.raises(TypeError, match="model must be"):
        function(list(Net().parameters()))
    with pytest.raises(TypeError, match="include"):
        function(Net(), include=3)
    with pytest.raises(TypeError, match=r"include must be glob patterns over names, got a Parameter$"):
        function(Net(), include=Net().parameters())


def test_frozen_parameters_keep_no_gradient():
    """An optimizer applies a gradient that is left over, also to a parameter that does not require one."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 4)).square().sum().backward()
    model.head.requires_grad_(False)  # by hand, with its gradient
    assert freeze(model) == BACKBONE + HEAD
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert freeze(model) == []


@pytest.mark.parametrize("name", ["0", "1", "0.weight", "1.w*"])
def test_tied_parameters_go_by_either_name(name):
    model = tied()
    assert freeze(model, name) == ["0.weight"]
    assert thaw(model, exclude=name) == []
    assert thaw(model, name) == ["0.weight"]


def test_integer_parameters_stay_without_gradient():
    model = nn.Linear(2, 2)
    model.quantised = nn.Parameter(torch.zeros(4, dtype=torch.int8), requires_grad=False)
    assert freeze(model) == thaw(model) == ["weight", "bias"]


@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.LazyBatchNorm1d(affine=False)], ids=str)
def test_lazy_modules(lazy):
    model = nn.Sequential(nn.Linear(2, 2), lazy)
    with pytest.raises(ValueError, match=r"'1.*not initialized"):
        freeze(model)
    assert trained(model)[:2] == ["0.weight", "0.bias"]
    assert freeze(model, "0") == ["0.weight", "0.bias"]


# ------------------------------------------------------------------------------------------------- normalizations


@pytest.mark.parametrize(
    "norm, options",
    [
        (nn.BatchNorm2d, {}),
        (nn.BatchNorm2d, {"affine": False}),
        (nn.SyncBatchNorm, {}),
        (nn.InstanceNorm2d, {"track_running_stats": True}),
        (nn.InstanceNorm2d, {"track_running_stats": True, "affine": True}),
    ],
)
def test_frozen_statistics(norm, options):
    """pytorch#86590: requires_grad=False does not keep a BatchNorm from updating and from normalizing by the batch."""
    model = conv_net(norm, **options)
    model[1].running_mean.fill_(0.3)
    expected = copy.deepcopy(model).eval()(images().zero_())
    before = copy.deepcopy(model.state_dict())
    freeze(model, exclude="4")
    for _ in range(2):
        model.train()
        assert torch.equal(model(images().zero_()), expected)
        model(images())
    assert isinstance(model[1], norm)
    assert model[4].training
    assert "Frozen" + norm.__name__ in repr(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    thaw(model)
    assert type(model[1]) is norm
    assert model[1].training
    if norm is not nn.SyncBatchNorm:  # which does not train on the CPU
        model(images())
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_normalizations_without_parameters_go_by_their_name():
    model = conv_net(affine=False)
    assert freeze(model, "0") == ["0.weight", "0.bias"]
    assert type(model[1]) is nn.BatchNorm2d
    assert freeze(model, "1") == ["1"]
    assert freeze(model, "1") == []
    assert thaw(model, exclude="1") == ["0.weight", "0.bias"]
    assert not model.train()[1].training
    assert thaw(model) == ["1"]
    assert model[1].training


def test_what_is_not_held_in_eval():
    """Other layers, normalizations without statistics, and those of which nothing was frozen here."""
    model = nn.Sequential(
        nn.BatchNorm1d(3, track_running_stats=False), nn.LayerNorm(3), nn.Dropout(), nn.BatchNorm1d(3)
    )
    model[3].requires_grad_(False)
    freeze(model, exclude="3")
    assert all(m.training for m in model)
    freeze(model)
    assert [m.training for m in model] == [True, True, True, False]


def test_half_a_normalization():
    """Held while all of its parameters are frozen, whichever call froze them; trained as soon as one is thawed."""
    model = conv_net()
    freeze(model, "1.weight")
    assert model[1].training
    freeze(model, "1.bias")
    assert not model[1].training
    freeze(model, "1")
    assert type(model[1]).__name__ == "FrozenBatchNorm2d"
    assert thaw(model, "1.bias") == ["1.bias"]
    assert type(model[1]) is nn.BatchNorm2d
    assert model[1].training


@pytest.mark.parametrize("mode", [True, False])
def test_thaw_takes_the_mode_of_the_model(mode):
    model = conv_net().train(not mode)
    freeze(model)
    model.train(mode)
    thaw(model)
    assert model[1].training == mode


@pytest.mark.parametrize("way", ["deepcopy", "copy", "torch.save", *range(pickle.HIGHEST_PROTOCOL + 1)])
def test_frozen_models_can_be_copied(way):
    model = conv_net()
    freeze(model, exclude="4")
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "copy":
        twin = nn.Sequential(*(copy.copy(m) for m in model))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = pickle.loads(pickle.dumps(model, way))
    x = images()
    assert type(twin[1]) is type(model[1])
    assert torch.equal(twin.train()(x), model.train()(x))
    assert trained(twin) == trained(model)
    thaw(twin)
    assert type(twin[1]) is nn.BatchNorm2d
    assert type(model[1]).__name__ == "FrozenBatchNorm2d"


def test_frozen_models_are_traced_as_others():
    """torch.fx keeps a BatchNorm whole, as what fuses it with a convolution expects."""
    model = conv_net()
    freeze(model)
    assert [node.op for node in torch.fx.symbolic_trace(model).graph.nodes].count("call_module") == 5


def test_frozen_models_compile():
    """Frozen before or after the compilation, and thawed again."""
    model, x = conv_net(), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    freeze(model, exclude="4")
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(compiled(x), model(x))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    compiled(x).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["4.weight", "4.bias"]
    thaw(model)
    compiled(x)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_nothing_resets_frozen_statistics():
    """update_bn does, and estimates them again in train mode, which a frozen layer does not have."""
    model = nn.Sequential(*conv_net(), nn.BatchNorm1d(3))
    model(images())
    freeze(model, "1")
    average = AveragedModel(model)
    average.update_parameters(model)
    before = copy.deepcopy(average.module.state_dict())
    update_bn([images()], average)
    after = average.module.state_dict()
    kept = {name for name, t in after.items() if torch.equal(t, before[name])}
    assert set(after) - kept == {"5.running_mean", "5.running_var"}
    thaw(model)
    model[1].reset_running_stats()
    assert not model[1].running_mean.any()


def test_a_class_that_has_changed_since():
    """parametrize makes a subclass of the frozen one."""
    model = conv_net()
    freeze(model, "1")
    parametrize.register_parametrization(model[1], "weight", nn.Softplus(), unsafe=True)
    freeze(model)
    assert not model.train()[1].training
    with pytest.raises(ValueError, match=r"'1' was frozen and has become .*ParametrizedFrozenBatchNorm2d"):
        thaw(model)
    assert trained(model) == []
    model(images())
    parametrize.remove_parametrizations(model[1], "weight")
    thaw(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert model[1].training


# --------------------------------------------------------------------------------------------------- replace_head


def test_a_new_linear_head():
    model = Net().double().eval()
    model.head.requires_grad_(False)
    backbone = model.backbone
    new = replace_head(model, 7)
    assert list(new) == HEAD
    assert all(new[name] is p for name, p in model.named_parameters() if name in HEAD)
    assert type(model.head) is nn.Linear
    assert (model.head.in_features, model.head.out_features) == (5, 7)
    assert all(p.dtype == torch.float64 and p.requires_grad for p in new.values())
    assert not model.head.training
    assert model.backbone is backbone
    assert model(torch.randn(2, 4).double()).shape == (2, 7)


def test_a_head_of_the_same_shape_is_new():
    model = Net()
    old = model.head.weight
    new = replace_head(model, 3)
    assert new["head.weight"] is not old
    assert not torch.equal(new["head.weight"], old)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_and_device_are_those_of_the_old_head(bias):
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 2, bias=bias, device="meta"))
    new = replace_head(model, 3)
    assert list(new) == ["1.weight", "1.bias"][: 1 + bias]
    assert new["1.weight"].device.type == "meta"


@pytest.mark.parametrize(
    "old",
    [
        nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=2, groups=2, padding_mode="reflect"),
        nn.Conv1d(4, 6, 3, padding="same", bias=False),
        nn.Conv3d(4, 6, 1),
        nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, dtype=torch.bfloat16),
        nn.ConvTranspose1d(4, 6, 3),
    ],
    ids=str,
)
def test_a_convolution_is_replaced_by_one(old):
    model = nn.Sequential(nn.Identity(), nn.Sequential(old))
    new = replace_head(model, 8)
    assert list(new) == [f"1.0.{name}" for name, _ in old.named_parameters()]
    assert repr(model[1][0]) == repr(old).replace("(4, 6", "(4, 8")
    assert model[1][0].weight.dtype == old.weight.dtype


def test_a_subclass_is_replaced_by_the_plain_layer():
    model = nn.MultiheadAttention(4, 2)  # its out_proj is a subclass of Linear
    assert list(replace_head(model, 6)) == ["out_proj.weight", "out_proj.bias"]
    assert type(model.out_proj) is nn.Linear


def test_a_module_as_the_head():
    model = Net().eval()
    head = nn.Sequential(nn.Dropout(), nn.Linear(5, 2))
    new = replace_head(model, head)
    assert model.head is head
    assert not head[0].training
    assert list(new) == ["head.1.weight", "head.1.bias"]


def test_parameters_that_the_model_had_are_not_new():
    model = Net()
    head = nn.Sequential(model.head, nn.Linear(3, 2))
    assert list(replace_head(model, head)) == ["head.1.weight", "head.1.bias"]


@pytest.mark.parametrize("name", ["0.1.1", "0.1"])
def test_by_name(name):
    model = nn.Sequential(Net().backbone, nn.PReLU())
    with pytest.raises(ValueError, match=r"'1', a PReLU.*name="):
        replace_head(model, 3)
    new = replace_head(model, 3 if name == "0.1.1" else nn.Linear(5, 3), name=name)
    assert list(new) == [f"{name}.weight", f"{name}.bias"]
    assert model(torch.randn(2, 4)).shape == (2, 3)


def test_a_shared_head_is_replaced_everywhere():
    model = nn.ModuleDict({"trunk": nn.Linear(4, 5), "head": nn.Linear(5, 3)})
    model["second"] = nn.Sequential(model["head"])
    assert list(replace_head(model, 2)) == ["head.weight", "head.bias"]
    assert model["second"][0] is model["head"]


@pytest.mark.parametrize(
    "head, name, kind, words",
    [
        (0, None, ValueError, ["head", "0"]),
        (-3, "head", ValueError, ["head", "-3"]),
        (True, None, TypeError, ["head", "True"]),
        (2.0, None, TypeError, ["head", "2.0"]),
        ("fc", None, TypeError, ["head", "fc"]),
        (3, "fc", ValueError, ["name", "'fc'", "'head'", "'backbone.1.1'"]),
        (3, "head.weight", ValueError, ["'head.weight'"]),
        (3, 1, TypeError, ["name", "1"]),
        (3, "", ValueError, ["model itself"]),
        (3, "backbone.1.0", ValueError, ["backbone.1.0", "BatchNorm1d", "module"]),
    ],
)
def test_errors(head, name, kind, words):
    model = Net()
    before = repr(model)
    with pytest.raises(kind) as caught:
        replace_head(model, head, name=name)
    assert all(word in str(caught.value) for word in words), caught.value
    assert repr(model) == before


def test_models_without_a_head_to_replace():
    with pytest.raises(ValueError, match="model itself"):
        replace_head(nn.Linear(2, 3), 4)
    with pytest.raises(ValueError, match="no parameters"):
        replace_head(nn.ReLU(), 4)
    with pytest.raises(ValueError, match="not initialized"):
        replace_head(nn.Sequential(nn.LazyLinear(3)), 4)
    with pytest.raises(TypeError, match="model must be"):
        replace_head([nn.Linear(2, 3)], 4)


def layers(*names, outputs=3):
    """A stand-in: linear layers of these names, in this order, the last one or two of which are heads."""
    model = nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        parent = model
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        is_norm = "norm" in leaf.lower()
        wide = name.startswith(("body", "roberta"))
        parent.add_module(leaf, nn.LayerNorm(7) if is_norm else nn.Linear(7, 7 if wide else outputs))
    return model


# Names in their order of registration, as found in timm 1.0.31, torchvision 0.29.1 and transformers 5.24.0 (once and by
# hand: these are stand-ins).
@pytest.mark.parametrize(
    "names, head",
    [
        (("body.layer4", "fc"), "fc"),
        (("body.blocks", "body.norm", "head"), "head"),
        (("body.stages", "head.norm", "head.fc"), "head.fc"),
        (("body.encoder", "heads.head"), "heads.head"),
        (("body.features", "last_linear"), "last_linear"),
        (("body.cell", "head.fc.norm", "head.fc.fc2"), "head.fc.fc2"),
        (("body.bert", "classifier"), "classifier"),
        (("body.layers", "body.norm", "score"), "score"),
        (("body.layers", "body.norm", "lm_head"), "lm_head"),
        (("classifier", "roberta.layer", "roberta.norm"), "classifier"),
        (("classifier.out_proj", "roberta.layer", "roberta.norm"), "classifier.out_proj"),
        (("lm_head.decoder", "roberta.layer", "roberta.norm"), "lm_head.decoder"),
        (("body.layer", "cls.predictions.decoder", "cls.predictions.norm"), "cls.predictions.decoder"),
        (("body.distilbert.dist_layer", "classifier"), "classifier"),
    ],
)
def test_heads_of_known_names(names, head):
    model = layers(*names)
    assert list(replace_head(model, 2)) == [f"{head}.weight", f"{head}.bias"]
    assert model.get_submodule(head).out_features == 2


@pytest.mark.parametrize(
    "heads",
    [
        ("head", "head_dist"),
        ("head.linear", "head_dist.linear"),
        ("head.head.l", "head.head_dist.l"),
        ("aux_head", "head"),
        ("head.0", "head.1"),
        ("aux1.fc2", "fc"),
        ("AuxLogits.fc", "fc"),
        ("classifier.low_classifier", "classifier.high_classifier"),
        ("cls_classifier", "distillation_classifier"),
        ("classifier.linear", "classifier_distill.linear"),
        ("head", "dist_head"),
    ],
)
def test_a_second_head_is_not_left_behind(heads):
    model = layers("body.layer", *heads)
    with pytest.raises(ValueError, match="for each with name="):
        replace_head(model, 2)
    assert all(model.get_submodule(head).out_features == 3 for head in heads)
    for head in heads:
        replace_head(model, 2, name=head)
    assert all(model.get_submodule(head).out_features == 2 for head in heads)
    in_sequence = nn.ModuleDict({"head": nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))})
    assert list(replace_head(in_sequence, 2)) == ["head.2.weight", "head.2.bias"]


def test_a_head_that_holds_the_model():
    model = Net()
    with pytest.raises(ValueError, match="holds the model"):
        replace_head(model, nn.Sequential(model))
    with pytest.raises(ValueError, match=r"backbone\.0"):
        replace_head(model, model.backbone, name="backbone.0")


# ------------------------------------------------------------------------------------------------------- together


def test_fine_tuning_of_a_new_head():
    """A frozen backbone with BatchNorm, a head pulled to 0: after some steps only the head has moved."""
    model = Net()
    new = replace_head(model, 2)
    reg = L2SP(model, 0.1, new=new, new_strength=0.1)
    freeze(model, exclude=new)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(new.values(), lr=0.1)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.randint(2, (8,))).backward()
        reg.add_grad_()
        optimizer.step()
    moved = [name for name, t in model.state_dict().items() if not torch.equal(t, before[name])]
    assert moved == HEAD
