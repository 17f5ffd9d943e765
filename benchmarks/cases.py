"""The cases of the speed table: what is computed, by whom, over which tensors.

A builder makes its tensors when it is called, so that one case is in memory at a time. All logits are random
and independent of each other: nothing is one-hot, masked or equal, so nothing can be skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import naive, oracle
from benchmarks.shapes import resnet18
from benchmarks.timing import Case, Provider
from fasttransfer import blend_, blend_many_, kd_loss, l2sp_add_grad_

NAIVE, COMPILED, FOREACH, OURS = "naive", "torch.compile", "_foreach_lerp_", "fasttransfer"
LABEL_WEIGHT = 0.3
STRENGTH = 0.01


@dataclass(frozen=True)
class Builder:
    """A case that has not been built yet: its title, and how to build it with or without `torch.compile`."""

    title: str
    build: Callable[[bool], Case]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under default inductor with static shapes, compiled for this case at its first call."""
    return torch.compile(function, dynamic=False)


def logits(rows: int, vocab: int, seed: int) -> Tensor:
    """Random float32 logits [rows, vocab] of scale 3."""
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3.0


def like_parameters(shapes: Sequence[tuple[int, ...]], seed: int) -> list[Tensor]:
    """Random float32 tensors of these shapes, of the size trained weights have."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.05 for shape in shapes]


def leaf_of(tensor: Tensor) -> Tensor:
    """A fresh leaf on the same memory: no gradient yet, and nothing copied that would warm the caches."""
    return tensor.detach().requires_grad_(True)


def loss_and_grad(leaf: Tensor, loss: Tensor) -> list[Tensor]:
    """What a provider of a loss is judged by: its value and the gradient it left in its leaf."""
    return [loss.detach(), leaf.grad]  # type: ignore[list-item]


def backward_of(loss_function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Forward and backward of a loss of one leaf, as one timed call."""

    def forward_backward(leaf: Tensor) -> Tensor:
        loss = loss_function(leaf)
        loss.backward()
        return loss

    return forward_backward


def calls_for(numbers: int) -> int:
    """Calls per round: many where a call takes microseconds, and what is measured is the cost of calling."""
    return 20 if numbers < 10_000 else 1


def add_roofline(a: Tensor, b: Tensor) -> tuple[Provider, int]:
    """`torch.add(a, b)` into new memory: two reads and a write per element, as in kd; and its bytes."""
    call = Provider("torch.add(a, b)", lambda _: torch.add(a, b), lambda: None, lambda _, out: [out])
    return call, 3 * a.numel() * a.element_size()


def kd_case(rows: int, vocab: int, temperature: float, compile_too: bool, *, labelled: bool = False) -> Case:
    """Forward and backward of distillation, teacher without gradient, a fresh student leaf for every call."""
    student, teacher = logits(rows, vocab, 0), logits(rows, vocab, 1)
    if labelled:
        labels = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(2))
        by_hand: Callable[..., Tensor] = naive.kd_with_labels
        extra: tuple[Any, ...] = (labels, temperature, LABEL_WEIGHT)
        exact = oracle.kd_with_labels(student, teacher, labels, temperature, LABEL_WEIGHT)

        def ours(leaf: Tensor) -> Tensor:
            return kd_loss(leaf, teacher, labels, temperature=temperature, label_weight=LABEL_WEIGHT)
    else:
        by_hand, extra = naive.kd, (temperature,)
        exact = oracle.kd(student, teacher, temperature)

        def ours(leaf: Tensor) -> Tensor:
            return kd_loss(leaf, teacher, temperature=temperature)

    functions: dict[str, Callable[[Tensor], Tensor]] = {NAIVE: lambda leaf: by_hand(leaf, teacher, *extra)}
    if compile_too:
        by_inductor = compiled(by_hand)
        functions[COMPILED] = lambda leaf: by_inductor(leaf, teacher, *extra)
    functions[OURS] = ours
    roofline, roofline_bytes = add_roofline(student, teacher)
    name = "kd + labels" if labelled else "kd"
    return Case(
        key=f"{name.replace(' + ', '_')}_{rows}x{vocab}",
        title=kd_title(rows, vocab, labelled),
        operation="kd",
        floor_bytes=3 * student.numel() * student.element_size(),
        providers=[
            Provider(who, backward_of(function), lambda: leaf_of(student), loss_and_grad)
            for who, function in functions.items()
        ],
        exact=exact,
        roofline=roofline,
        roofline_bytes=roofline_bytes,
        calls_per_round=calls_for(student.numel()),
    )


def kd_title(rows: int, vocab: int, labelled: bool = False) -> str:
    """`kd 256x32000`, as it stands in the table."""
    return f"kd {'+ labels ' if labelled else ''}{rows}x{vocab}"


def fold_case(rows: int, vocab: int) -> Case:
    """Ours only: other temperatures and strided rows against the plain case, which should cost the same.

    The strided leaves are leaves themselves (not slices taken inside the graph), so that what is timed is the
    loss and not torch's backward of slicing.
    """
    student, teacher = logits(rows, vocab, 0), logits(rows, vocab, 1)
    groups = 4
    # `whole[:, :-1]` of [groups, rows / groups + 1, vocab]: a gap of one row after every group.
    shape = (groups, rows // groups, vocab)
    shifted_s = torch.zeros(groups, rows // groups + 1, vocab)[:, :-1].copy_(student.view(shape))
    shifted_t = torch.zeros(groups, rows // groups + 1, vocab)[:, :-1].copy_(teacher.view(shape))
    # `padded[:, :vocab]` of [rows, vocab + 64]: a gap after every row.
    padded_s = torch.zeros(rows, vocab + 64)[:, :vocab].copy_(student)
    padded_t = torch.zeros(rows, vocab + 64)[:, :vocab].copy_(teacher)
    variants: dict[str, tuple[Tensor, Tensor, float]] = {
        "T=2": (student, teacher, 2.0),
        "T=1": (student, teacher, 1.0),
        "T=3": (student, teacher, 3.0),
        "rows of [:, :-1]": (shifted_s, shifted_t, 2.0),
        "padded columns": (padded_s, padded_t, 2.0),
    }

    def provider(name: str, s: Tensor, t: Tensor, temperature: float) -> Provider:
        call = backward_of(lambda leaf: kd_loss(leaf, t, temperature=temperature))
        return Provider(name, call, lambda: leaf_of(s), loss_and_grad)

    roofline, roofline_bytes = add_roofline(student, teacher)
    exact = {temperature: oracle.kd(student, teacher, temperature) for temperature in (1.0, 2.0, 3.0)}
    return Case(
        key=f"fold_{rows}x{vocab}",
        title=f"variants {rows}x{vocab}",
        operation="fold",
        floor_bytes=3 * student.numel() * student.element_size(),
        providers=[provider(name, *arguments) for name, arguments in variants.items()],
        exact={
            name: [exact[temperature][0], exact[temperature][1].view(s.shape)]
            for name, (s, _, temperature) in variants.items()
        },
        roofline=roofline,
        roofline_bytes=roofline_bytes,
    )


def lerp_roofline(count: int) -> tuple[Provider, int]:
    """`a.lerp_(b, w)` over one flat tensor of that size: two reads and a write per element; and its bytes."""
    a, b, start = torch.randn(count), torch.randn(count), torch.randn(count)
    call = Provider("a.lerp_(b, w)", lambda x: x.lerp_(b, 0.1), lambda: a.copy_(start), lambda _, out: [out])
    return call, 3 * a.numel() * a.element_size()


def l2sp_case(model: str, shapes: Sequence[tuple[int, ...]], compile_too: bool) -> Case:
    """Value and gradient of the penalty, added to gradients that are already there."""
    params = [p.requires_grad_(True) for p in like_parameters(shapes, 0)]
    start, grads = like_parameters(shapes, 1), like_parameters(shapes, 2)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()

    def prepare() -> list[Tensor]:
        """The gradients of a data loss, as its backward has just written them: the same for everybody."""
        torch._foreach_copy_([p.grad for p in params], grads)
        return params

    def through_autograd(penalty: Callable[..., Any]) -> Callable[[list[Tensor]], Tensor]:
        def value_and_grad(of: list[Tensor]) -> Tensor:
            loss = penalty(of, start, STRENGTH)
            loss.backward()
            return loss

        return value_and_grad

    calls: dict[str, Callable[[list[Tensor]], Tensor]] = {NAIVE: through_autograd(naive.l2sp)}
    if compile_too:
        calls[COMPILED] = through_autograd(compiled(naive.l2sp))
    calls[OURS] = lambda of: l2sp_add_grad_(of, start, STRENGTH)
    count = sum(p.numel() for p in params)
    roofline, roofline_bytes = lerp_roofline(count)
    return Case(
        key=f"l2sp_{model}",
        title=f"l2sp_add_grad_ {model}",
        operation="l2sp",
        floor_bytes=4 * 4 * count,  # read p, p0 and the gradient, write the gradient
        providers=[
            Provider(who, call, prepare, lambda of, value: [value.detach()] + [p.grad for p in of])
            for who, call in calls.items()
        ],
        exact=oracle.l2sp([p.detach() for p in params], start, grads, STRENGTH),
        roofline=roofline,
        roofline_bytes=roofline_bytes,
        calls_per_round=calls_for(count),
    )


def blend_case(
    title: str,
    shapes: Sequence[tuple[int, ...]],
    alpha: float,
    source_count: int,
    by_hand: Callable[[Any, Any, float], Any],
    ours: Callable[[Any, Any, float], Any],
    compile_too: bool,
    *,
    foreach: bool = False,
) -> Case:
    """In-place blending. A single source is given as a list of tensors, several as a list of such lists."""
    original, target = like_parameters(shapes, 0), like_parameters(shapes, 0)
    sources = [like_parameters(shapes, 1 + i) for i in range(source_count)]
    given: Any = sources if source_count > 1 else sources[0]

    def prepare() -> list[Tensor]:
        torch._foreach_copy_(target, original)
        return target

    calls: dict[str, Callable[[list[Tensor]], Any]] = {NAIVE: lambda into: by_hand(into, given, alpha)}
    if compile_too:
        by_inductor = compiled(by_hand)
        calls[COMPILED] = lambda into: by_inductor(into, given, alpha)
    if foreach:
        calls[FOREACH] = lambda into: torch._foreach_lerp_(into, given, 1.0 - alpha)
    calls[OURS] = lambda into: ours(into, given, alpha)
    count = sum(t.numel() for t in target)
    roofline, roofline_bytes = lerp_roofline(count)
    return Case(
        key=title.replace(" ", "_"),
        title=title,
        operation="blend",
        floor_bytes=4 * (source_count + 2) * count,  # read target and sources, write target
        providers=[Provider(who, call, prepare, lambda into, _: into) for who, call in calls.items()],
        exact=oracle.blend(original, sources, alpha),
        roofline=roofline,
        roofline_bytes=roofline_bytes,
        calls_per_round=calls_for(count),
    )


def kd_rows() -> list[Builder]:
    """Distillation without labels from large to tiny, then with labels."""
    sizes = [(256, 32000, False), (64, 128256, False), (1024, 1000, False), (256, 32000, True)]
    sizes += [(8, 10, False), (8, 10, True)]
    return [
        Builder(
            kd_title(rows, vocab, labelled),
            lambda c, r=rows, v=vocab, labelled=labelled: kd_case(r, v, 2.0, c, labelled=labelled),
        )
        for rows, vocab, labelled in sizes
    ]


def list_rows() -> list[Builder]:
    """The penalty and the blends over lists of parameters; compiling a list of one tiny tensor shows nothing."""
    model, tiny = resnet18(), [(8, 10)]
    two = ("blend_ ResNet-18", model, 0.5, 1, naive.blend, blend_)
    ema = ("blend_ EMA ResNet-18", model, 0.999, 1, naive.ema, blend_)
    three = ("blend_many_ x3 ResNet-18", model, 0.4, 3, naive.blend_many, blend_many_)
    tiny_ema = ("blend_ EMA 8x10", tiny, 0.999, 1, naive.ema, blend_)
    return [
        Builder("l2sp_add_grad_ ResNet-18", lambda c: l2sp_case("ResNet-18", model, c)),
        Builder("l2sp_add_grad_ 8x10", lambda _: l2sp_case("8x10", tiny, False)),
        Builder(two[0], lambda c: blend_case(*two, c)),
        Builder(ema[0], lambda c: blend_case(*ema, c, foreach=True)),
        Builder(tiny_ema[0], lambda _: blend_case(*tiny_ema, False, foreach=True)),
        Builder(three[0], lambda c: blend_case(*three, c)),
    ]


def table() -> list[Builder]:
    """The rows of the speed table, in order."""
    return kd_rows() + list_rows()


def folds(quick: bool) -> list[Builder]:
    """The rows of ours only, against each other."""
    sizes = [(256, 32000)] if quick else [(256, 32000), (64, 128256)]
    return [
        Builder(f"variants {rows}x{vocab}", lambda _, rows=rows, vocab=vocab: fold_case(rows, vocab))
        for rows, vocab in sizes
    ]
