"""What kd_loss refuses: the error names the argument, says what was given, and nothing was modified."""

import re

import numpy as np
import pytest
import torch

from fasttransfer import KDLoss, kd_loss

NAN, INF = float("nan"), float("inf")
Y = torch.tensor([0, 1, 8])
DISTILL = {"label_weight": 0.5, "ignored_rows": "distill"}


def cpu(*shape, **options):
    return torch.zeros(*shape, **options)


# name: (error, what its message holds, changes to a call with 3 rows of 9 logits). `message` begins with the
# argument's name wherever there is one argument to blame.
TYPE_ERRORS = {
    "student is a list": ("student_logits must be a tensor, got list", {"student_logits": [[0.0, 1.0]]}),
    "teacher is None": ("teacher_logits must be a tensor, got NoneType", {"teacher_logits": None}),
    "student is an array": (
        "student_logits must be a tensor, got ndarray",
        {"student_logits": np.zeros((3, 9))},
    ),
    "student of integers": (
        "student_logits must be float32, .* got int64",
        {"student_logits": cpu(3, 9).long()},
    ),
    "student is complex": (
        "student_logits must be float32, .* got complex64",
        {"student_logits": cpu(3, 9) * 1j},
    ),
    "teacher in 8 bits": (
        "teacher_logits .* float8_e4m3fn",
        {"teacher_logits": cpu(3, 9).to(torch.float8_e4m3fn)},
    ),
    "student is sparse": (
        "student_logits must be a dense .*sparse",
        {"student_logits": cpu(3, 9).to_sparse()},
    ),
    "labels are a list": ("labels must be a tensor, got list", {"labels": [0, 1, 2], "label_weight": 0.5}),
    "labels are int32": ("labels must be int64 .* got int32", {"labels": Y.int(), "label_weight": 0.5}),
    "labels are probabilities": (
        "labels must be int64 .* got float32",
        {"labels": cpu(3, 9), "label_weight": 0.5},
    ),
    "temperature is a string": ("temperature must be a number, got str '2'", {"temperature": "2"}),
    "temperature is True": ("temperature must be a number, got bool True", {"temperature": True}),
    "temperature is None": ("temperature must be a number, got NoneType", {"temperature": None}),
    "temperature is complex": (
        "temperature must be real|temperature must be a real",
        {"temperature": cpu(3) * 1j},
    ),
    "temperature is sparse": ("temperature must be .*dense", {"temperature": torch.ones(3).to_sparse()}),
    "label_weight is a tensor": (
        "label_weight must be a number, got Tensor",
        {"labels": Y, "label_weight": cpu(())},
    ),
    "label_smoothing is a string": (
        "label_smoothing must be a number",
        {"labels": Y, "label_weight": 0.5, "label_smoothing": "0.1"},
    ),
    "ignore_index is a float": ("ignore_index must be an int, got -1.0", {"ignore_index": -1.0}),
    "ignore_index is None": ("ignore_index must be an int, got None", {"ignore_index": None}),
    "row_weight is a list": ("row_weight must be a tensor, got list", {"row_weight": [1.0, 1.0, 1.0]}),
    "row_weight is sparse": ("row_weight must be .*dense", {"row_weight": torch.ones(3).to_sparse()}),
    "vocab_size is a float": ("vocab_size must be an int or None, got 9.0", {"vocab_size": 9.0}),
    "vocab_size is True": ("vocab_size must be an int or None, got True", {"vocab_size": True}),
    "num_items is a string": ("num_items must be a number, got str", {"num_items": "3"}),
    "num_items is True": ("num_items must be a number, got bool", {"num_items": True}),
    "num_items is complex": ("num_items must be .*real", {"num_items": torch.tensor(1j)}),
    "scale_by_t2 is 1": ("scale_by_t2 must be True or False, got 1", {"scale_by_t2": 1}),
    "inplace is None": ("inplace must be True or False, got None", {"inplace": None}),
}
VALUE_ERRORS = {
    "rows differ": (
        r"student_logits and teacher_logits .* \[3, 9\] and \[4, 9\]",
        {"teacher_logits": cpu(4, 9)},
    ),
    "dimensions differ": (
        r"student_logits and teacher_logits .* \[3, 9\] and \[9\]",
        {"teacher_logits": cpu(9)},
    ),
    "rows would broadcast": (r"student_logits and teacher_logits .* \[1, 9\]", {"teacher_logits": cpu(1, 9)}),
    "no dimension": (
        "student_logits and teacher_logits",
        {"student_logits": cpu(()), "teacher_logits": cpu(())},
    ),
    "widths differ": (
        "student_logits has 9 columns and teacher_logits 12.* vocab_size=",
        {"teacher_logits": cpu(3, 12)},
    ),
    "one column": (
        r"1 column.*two logits.*\[0, z\]",
        {"student_logits": cpu(3, 1), "teacher_logits": cpu(3, 1)},
    ),
    "no column": ("0 column", {"student_logits": cpu(3, 0), "teacher_logits": cpu(3, 0)}),
    "vocab_size 1": (r"at least 2, got 1.*two logits.*\[0, z\]", {"vocab_size": 1}),
    "vocab_size 0": ("vocab_size must be at least 2, got 0", {"vocab_size": 0}),
    "vocab_size negative": ("vocab_size must be at least 2, got -1", {"vocab_size": -1}),
    "vocab_size too large": ("vocab_size must be between 2 .* got 10 .*9 columns", {"vocab_size": 10}),
    "another device": (
        "teacher_logits is on meta, student_logits on cpu",
        {"teacher_logits": cpu(3, 9, device="meta")},
    ),
    "labels elsewhere": ("labels is on meta", {"labels": Y.to("meta"), "label_weight": 0.5}),
    "row_weight elsewhere": ("row_weight is on meta", {"row_weight": cpu(3, device="meta")}),
    "temperature elsewhere": ("temperature is on meta", {"temperature": cpu(3, device="meta")}),
    "num_items elsewhere": ("num_items is on meta", {"num_items": cpu((), device="meta")}),
    "labels without label_weight": ("labels were given without label_weight", {"labels": Y}),
    "label_weight without labels": ("label_weight=0.5 was given without labels", {"label_weight": 0.5}),
    "label_weight 0 without labels": ("label_weight=0.0 was given without labels", {"label_weight": 0.0}),
    "label_smoothing without labels": (
        "label_smoothing=0.1 was given without labels",
        {"label_smoothing": 0.1},
    ),
    "label_weight above 1": (
        "label_weight must be between 0 and 1, got 1.5",
        {"labels": Y, "label_weight": 1.5},
    ),
    "label_weight negative": ("label_weight must be between 0 and 1", {"labels": Y, "label_weight": -0.1}),
    "label_weight NaN": ("label_weight must be between 0 and 1, got nan", {"labels": Y, "label_weight": NAN}),
    "label_smoothing above 1": (
        "label_smoothing must be between 0 and 1",
        {"labels": Y, "label_weight": 0.5, "label_smoothing": 1.1},
    ),
    "labels of another shape": (r"labels must .* \[3\], got \[2\]", {"labels": Y[:2], "label_weight": 0.5}),
    "labels with a column": (
        r"labels must .* \[3\], got \[3, 1\]",
        {"labels": Y[:, None], "label_weight": 0.5},
    ),
    "label too large": (
        r"labels must be in \[0, 9\).* got 16 at index \[2\]",
        {"labels": Y + Y, "label_weight": 0.5},
    ),
    "label negative": (r"labels .* -1 at index \[0\]", {"labels": Y - 1, "label_weight": 0.5}),
    "label beyond vocab_size": (
        r"labels must be in \[0, 8\).* got 8",
        {"labels": Y, "label_weight": 0.5, "vocab_size": 8},
    ),
    "label, though it weighs nothing": ("labels must be in", {"labels": Y + 1, "label_weight": 0.0}),
    "default ignore_index under another": (
        "labels must be in .*ignore_index",
        {"labels": Y - 100, "label_weight": 0.5, "ignore_index": -1},
    ),
    "temperature 0": ("temperature must be .* got 0", {"temperature": 0}),
    "temperature negative": ("temperature must be .* got -1", {"temperature": -1.0}),
    "temperature NaN": ("temperature must be .* got nan", {"temperature": NAN}),
    "temperature infinite": ("temperature must be .* got inf", {"temperature": INF}),
    "temperature beyond all numbers": ("temperature must be", {"temperature": 10**400}),
    "one temperature 0": (
        "temperature must be .* every row, got 0",
        {"temperature": torch.tensor([1.0, 0.0, 1.0])},
    ),
    "one temperature NaN": (
        "temperature must be .* every row, got nan",
        {"temperature": torch.tensor([1.0, NAN, 1.0])},
    ),
    "temperature tensor of one 0": ("temperature must be", {"temperature": torch.tensor(0.0)}),
    "temperatures of another shape": (
        r"temperature must .* \[3\], got \[3, 1\]",
        {"temperature": torch.ones(3, 1)},
    ),
    "temperature would broadcast": (r"temperature must .* \[3\], got \[1\]", {"temperature": torch.ones(1)}),
    "temperature is learned": (
        "temperature requires grad",
        {"temperature": torch.ones(3, requires_grad=True)},
    ),
    "row_weight of another shape": (r"row_weight must .* \[3\], got \[9\]", {"row_weight": cpu(9)}),
    "row_weight is learned": ("row_weight requires grad", {"row_weight": torch.ones(3, requires_grad=True)}),
    "reduction unknown": (
        "reduction must be one of 'mean', 'batchmean', 'sum', 'none', got 'avg'",
        {"reduction": "avg"},
    ),
    "reduction None": ("reduction must be one of", {"reduction": None}),
    "batchmean of one row": (
        "reduction='batchmean'",
        {"student_logits": cpu(9), "teacher_logits": cpu(9), "reduction": "batchmean"},
    ),
    "ignored_rows unknown": (
        "ignored_rows must be one of 'skip', 'distill', got 'keep'",
        {"ignored_rows": "keep"},
    ),
    "ignore_index beyond int64": ("ignore_index must be", {"ignore_index": 2**63}),
    "num_items 0": ("num_items must be greater than 0", {"num_items": 0}),
    "num_items negative": ("num_items must be greater than 0", {"num_items": -2}),
    "num_items NaN": ("num_items must be greater than 0", {"num_items": NAN}),
    "num_items infinite": ("num_items must be greater than 0 and finite", {"num_items": INF}),
    "num_items tensor below 0": ("num_items must be at least 0", {"num_items": torch.tensor(-1)}),
    "num_items with sum": ("num_items .*reduction='sum'", {"num_items": 3, "reduction": "sum"}),
    "num_items with none": ("num_items .*reduction='none'", {"num_items": 3, "reduction": "none"}),
    "num_items of three": (
        "num_items must be one number or a pair",
        {"num_items": (1, 2, 3), "labels": Y, **DISTILL},
    ),
    "num_items of none": ("num_items must be one number or a pair", {"num_items": []}),
    "num_items of three in a tensor": (
        "num_items must be one number",
        {"num_items": torch.ones(3), "labels": Y, **DISTILL},
    ),
    "num_items pair holds 0": (
        "num_items must be greater than 0",
        {"num_items": (3, 0), "labels": Y, **DISTILL},
    ),
    "num_items pair without distill": ("num_items is a pair", {"num_items": (3, 2)}),
}


def tensors_of(call):
    return {k: v for k, v in call.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}


def refuse(error, message, changes):
    """The call raises, twice the same, and no tensor of it was written, neither its values nor its version."""
    call = {
        "student_logits": torch.randn(3, 9, requires_grad=True),
        "teacher_logits": torch.randn(3, 9),
        **changes,
    }
    plain = {k: v for k, v in tensors_of(call).items() if v.layout is torch.strided and not v.is_nested}
    before = {k: v.detach().clone() for k, v in plain.items()}
    versions = {k: v._version for k, v in plain.items()}
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        kd_loss(**call)
    for name, tensor in plain.items():
        assert tensor._version == versions[name], name
        assert tensor.detach().equal(before[name]) or tensor.isnan().any(), name


@pytest.mark.parametrize("case", TYPE_ERRORS)
def test_type_error(case):
    refuse(TypeError, *TYPE_ERRORS[case])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([cpu(3, 9)], layout=layout)
        refuse(TypeError, "teacher_logits must be a dense .*nested|jagged", {"teacher_logits": nested})


@pytest.mark.parametrize("case", VALUE_ERRORS)
def test_value_error(case):
    refuse(ValueError, *VALUE_ERRORS[case])


@pytest.mark.parametrize(
    "case", [k for k, (_, c) in VALUE_ERRORS.items() if not {"student_logits", "inplace"} & set(c)]
)
def test_a_refused_inplace_call_has_overwritten_nothing(case):
    message, changes = VALUE_ERRORS[case]
    logits = torch.randn(3, 9, requires_grad=True) * 1
    before, version = logits.detach().clone(), logits._version
    call = {"student_logits": logits, "teacher_logits": torch.randn(3, 9), **changes}
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        kd_loss(**call, inplace=True)
    assert torch.equal(logits.detach(), before)
    assert logits._version == version


@pytest.mark.parametrize(
    "name", [
        "temperature", "label_weight", "ignore_index", "ignored_rows", "label_smoothing", "vocab_size", "reduction",
        "scale_by_t2", "inplace",
    ],
)  # fmt: skip
def test_module_refuses_its_options_when_it_is_built(name):
    with pytest.raises((TypeError, ValueError), match=name):
        KDLoss(**{name: object()})


def test_module_says_that_it_needs_labels():
    s, t = torch.randn(3, 9), torch.randn(3, 9)
    with pytest.raises(ValueError, match=r"label_weight=0\.5 was given without labels"):
        KDLoss(label_weight=0.5)(s, t)
    with pytest.raises(ValueError, match="labels were given without label_weight"):
        KDLoss()(s, t, Y)


def test_options_are_keywords():
    """Three tensors by position; a fourth would be a temperature for one reader and a weight for another."""
    s, t = torch.randn(3, 9), torch.randn(3, 9)
    with pytest.raises(TypeError, match="positional"):
        kd_loss(s, t, Y, 2.0)
    with pytest.raises(TypeError, match="positional"):
        KDLoss(2.0)
    with pytest.raises(TypeError, match="group_size"):
        kd_loss(s, t, group_size=2)


def test_constants_that_require_grad_are_taken_without_grad_mode():
    s, t = torch.randn(3, 9), torch.randn(3, 9, requires_grad=True)
    with torch.no_grad():
        expected = kd_loss(s, t.detach())
        assert torch.equal(kd_loss(s, t, row_weight=torch.ones(3, requires_grad=True)), expected)


def test_numbers_of_numpy_are_numbers():
    s, t = torch.randn(3, 9), torch.randn(3, 9)
    expected = kd_loss(s, t, Y, temperature=2.0, label_weight=0.5)
    for kind in (np.float64, np.float32, np.float16):
        loss = kd_loss(s, t, Y, temperature=kind(2), label_weight=kind(0.5), label_smoothing=kind(0))
        assert torch.equal(loss, expected)
    assert torch.equal(kd_loss(s, t, num_items=np.int64(3)), kd_loss(s, t, num_items=3))
