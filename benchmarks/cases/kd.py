"""The cases of distillation: rows x vocabulary, two dtypes, with and without backward and labels.

All logits are random and independent of each other: nothing is one-hot, masked or equal, so nothing can be skipped.
The teacher has no gradient; the student is a fresh leaf for every call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import naive, peers
from benchmarks.cases.common import (
    COMPILED,
    DTYPES,
    NAIVE,
    OURS,
    REFERENCE,
    Spec,
    calls_for,
    compiled,
    is_memory_bound,
    key_of,
    threads,
)
from benchmarks.oracle import Distillation
from benchmarks.timing import Case, Provider, Roofline
from fasttransfer import build_info, kd_loss, simd_level, simd_levels, use_backend

TEMPERATURE, LABEL_WEIGHT = 2.0, 0.3
ADD, ADD_OUT = "torch.add(a, b)", "torch.add(a, b, out=o)"
Loss = Callable[[Tensor], Tensor]


class Problem:
    """The tensors of one size, the exact answer, and how a loss function becomes a provider."""

    def __init__(
        self, rows: int, vocab: int, dtype: str, *, labelled: bool = False, backward: bool = True
    ) -> None:
        self.rows, self.vocab, self.dtype, self.labelled, self.backward = (
            rows,
            vocab,
            dtype,
            labelled,
            backward,
        )
        self.student, self.teacher = (self._logits(seed) for seed in (0, 1))
        generator = torch.Generator().manual_seed(2)
        self.labels = torch.randint(vocab, (rows,), generator=generator) if labelled else None
        self.exact = Distillation(self.student, self.teacher, self.labels, TEMPERATURE, LABEL_WEIGHT)

    def _logits(self, seed: int) -> Tensor:
        """Random logits [rows, vocab] of scale 3."""
        made = torch.randn(self.rows, self.vocab, generator=torch.Generator().manual_seed(seed))
        return made.mul_(3.0).to(DTYPES[self.dtype])

    @property
    def numbers(self) -> int:
        """Logits on one side."""
        return self.student.numel()

    @property
    def floor_bytes(self) -> int:
        """Read both sides; with backward, write the gradient."""
        return (3 if self.backward else 2) * self.numbers * self.student.element_size()

    def naive_loss(self, function: Callable[..., Any] | None = None) -> Loss:
        """The naive code, or a function of its arguments in its place."""
        if self.labels is None:
            call, arguments = function or naive.kd, (TEMPERATURE,)
        else:
            call, arguments = function or naive.kd_with_labels, (self.labels, TEMPERATURE, LABEL_WEIGHT)
        return lambda leaf: call(leaf, self.teacher, *arguments)

    def our_loss(self, **options: Any) -> Loss:
        """kd_loss."""
        if self.labels is not None:
            options["label_weight"] = LABEL_WEIGHT
        return lambda leaf: kd_loss(leaf, self.teacher, self.labels, temperature=TEMPERATURE, **options)

    def provider(self, name: str, loss: Loss, **more: Any) -> Provider:
        """Forward and backward, or forward only, of a loss of the student."""
        if not self.backward:
            return Provider(name, torch.no_grad()(loss), lambda: self.student, lambda _, out: [out], **more)
        return Provider(name, and_backward(loss), lambda: leaf_of(self.student), loss_and_grad, **more)

    def add_roofline(self, name: str = ADD, **more: Any) -> Roofline:
        """`torch.add(a, b)`: two reads and a write per element, as in kd, into new or given memory."""
        a, b = self.student, self.teacher
        call = Provider(name, lambda _: torch.add(a, b), lambda: None, lambda _, out: [out], **more)
        if name == ADD_OUT:
            given = torch.empty_like(a)
            call = replace(call, call=lambda _: torch.add(a, b, out=given))
        return Roofline(call, 3 * self.numbers * a.element_size())

    def case(self, spec: Spec, providers: list[Provider], rooflines: list[Roofline]) -> Case:
        """All of it."""
        return Case(
            key=spec.key,
            title=spec.title,
            operation="kd",
            floor_bytes=self.floor_bytes,
            providers=providers,
            error=lambda _, outputs: self.exact.error(outputs),
            rooflines=rooflines,
            dtype=self.dtype,
            calls_per_round=calls_for(self.numbers),
            memory_bound=is_memory_bound(self.numbers),
            about=spec.about,
        )


def leaf_of(tensor: Tensor) -> Tensor:
    """A fresh leaf on the same memory: no gradient yet, and nothing copied that would warm the caches."""
    return tensor.detach().requires_grad_(True)


def loss_and_grad(leaf: Tensor, loss: Tensor) -> list[Tensor]:
    """What a provider of a loss is judged by: its value and the gradient it left in its leaf."""
    return [loss.detach(), leaf.grad]  # type: ignore[list-item]


def and_backward(loss_function: Loss) -> Loss:
    """Forward and backward of a loss of one leaf, as one timed call."""

    def forward_backward(leaf: Tensor) -> Tensor:
        loss = loss_function(leaf)
        loss.backward()
        return loss

    return forward_backward


def build(
    spec: Spec, rows: int, vocab: int, dtype: str, labelled: bool, backward: bool, kinds: frozenset[str]
) -> Case:
    """The plain case: everybody who computes it."""
    problem = Problem(rows, vocab, dtype, labelled=labelled, backward=backward)
    providers = []
    if "naive" in kinds:
        providers.append(problem.provider(NAIVE, problem.naive_loss()))
    if "compile" in kinds:
        by_hand = naive.kd_with_labels if labelled else naive.kd
        providers.append(problem.provider(COMPILED, problem.naive_loss(compiled(by_hand))))
    if "peers" in kinds and not labelled:
        for name, loss in peers.kd_losses(problem.teacher, TEMPERATURE).items():
            providers.append(problem.provider(name, loss))
    if "reference" in kinds and build_info()["cpu_kernels"]:
        around = partial(use_backend, "reference")
        providers.append(problem.provider(REFERENCE, problem.our_loss(), ours=True, around=around))
    providers.append(problem.provider(OURS, problem.our_loss(), ours=True))
    # Forward only allocates nothing: the call that writes into given memory is the one like it, and the faster one.
    return problem.case(spec, providers, [problem.add_roofline(ADD if backward else ADD_OUT)])


class Given(torch.autograd.Function):
    """Makes logits on given memory that are no leaf and no view, as a model's last layer does."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        return torch.empty(0, dtype=box[0].dtype).set_(box[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ctx.box.append(grad)
        return None, None


def build_cliff(spec: Spec, rows: int, vocab: int, dtype: str, kinds: frozenset[str]) -> Case:
    """Outputs in new memory, which past 32 MiB the system maps anew at each call, and in given memory."""
    problem = Problem(rows, vocab, dtype)
    student = problem.student.clone()
    handle = torch.zeros((), requires_grad=True)

    def prepare() -> tuple[list[Tensor], Tensor]:
        box = [student.copy_(problem.student)]  # the last call has overwritten it
        return box, Given.apply(handle, box)

    loss = problem.our_loss(inplace=True)

    def call(given: tuple[list[Tensor], Tensor]) -> Tensor:
        value = loss(given[1])
        value.backward()
        return value

    inplace = Provider(
        f"{OURS}, inplace=True", call, prepare, lambda given, value: [value.detach(), given[0][1]],
        ours=True, roofline=ADD_OUT,
    )  # fmt: skip
    providers = [problem.provider(NAIVE, problem.naive_loss())] if "naive" in kinds else []
    providers += [problem.provider(OURS, problem.our_loss(), ours=True), inplace]
    return problem.case(spec, providers, [problem.add_roofline(), problem.add_roofline(ADD_OUT)])


def build_threads(spec: Spec, rows: int, vocab: int, dtype: str, kinds: frozenset[str]) -> Case:
    """One thread and two, of ours, of the naive code and of the roofline, in the same rounds."""
    problem = Problem(rows, vocab, dtype)
    providers, rooflines = [], []
    for count in (1, 2):
        around, suffix = partial(threads, count), f", {count} thread{'s' * (count > 1)}"
        judged = {"around": around, "roofline": ADD + suffix}
        if "naive" in kinds:
            providers.append(problem.provider(NAIVE + suffix, problem.naive_loss(), **judged))
        providers.append(problem.provider(OURS + suffix, problem.our_loss(), ours=True, **judged))
        rooflines.append(problem.add_roofline(ADD + suffix, around=around))
    return problem.case(spec, providers, rooflines)


def build_simd(spec: Spec, rows: int, vocab: int, dtype: str, kinds: frozenset[str]) -> Case:
    """Every SIMD level this machine has, and the naive code."""
    problem = Problem(rows, vocab, dtype)
    providers = [problem.provider(NAIVE, problem.naive_loss())] if "naive" in kinds else []
    for level in simd_levels():
        around = partial(simd_level, level)
        providers.append(problem.provider(f"{OURS}, {level}", problem.our_loss(), ours=True, around=around))
    return problem.case(spec, providers, [problem.add_roofline()])


def build_variants(spec: Spec, rows: int, vocab: int, kinds: frozenset[str]) -> Case:
    """Ours only: other temperatures and strided rows against the plain case, which should cost the same.

    The strided leaves are leaves themselves (not slices taken inside the graph), so that what is timed is the
    loss and not torch's backward of slicing.
    """
    problem = Problem(rows, vocab, "fp32")
    student, teacher = problem.student, problem.teacher
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
        call = and_backward(lambda leaf: kd_loss(leaf, t, temperature=temperature))
        return Provider(name, call, lambda: leaf_of(s), loss_and_grad, ours=True)

    exact = {t: Distillation(student, teacher, None, t, 0.0) for t in (1.0, 2.0, 3.0)}
    case = problem.case(
        spec, [provider(name, *each) for name, each in variants.items()], [problem.add_roofline()]
    )
    return replace(case, error=lambda name, outputs: exact[variants[name][2]].error(outputs))


def title_of(
    rows: int, vocab: int, dtype: str = "fp32", labelled: bool = False, backward: bool = True
) -> str:
    """`kd + labels 256x32000 bf16`, as it stands in the tables; fp32 and forward + backward go without saying."""
    words = [
        "kd",
        "+ labels" * labelled,
        "forward" * (not backward),
        f"{rows}x{vocab}",
        dtype.replace("fp32", ""),
    ]
    return " ".join(word for word in words if word)


def make(
    title: str, builder: Callable[..., Case], arguments: tuple[Any, ...], tags: str, **about: Any
) -> Spec:
    """A case: `builder(spec, *arguments, kinds)` makes it. A tag `compile` races torch.compile in a full run."""
    labels = set(tags.split())
    spec = Spec(
        key_of(title),
        title,
        "kd",
        lambda _: None,
        frozenset(labels - {"compile"}),
        "compile" in labels,
        about,
    )  # type: ignore[arg-type,return-value]
    return replace(spec, build=lambda kinds: builder(spec, *arguments, kinds))


def plain(
    rows: int, vocab: int, dtype: str, tags: str = "", *, labelled: bool = False, backward: bool = True
) -> Spec:
    """One size in one dtype, everybody in it."""
    group = "forward" if not backward else "labels" if labelled else "forward+backward"
    about = {
        "group": group,
        "dtype": dtype,
        "rows": rows,
        "vocab": vocab,
        "labels": labelled,
        "backward": backward,
    }
    title = title_of(rows, vocab, dtype, labelled, backward)
    return make(title, build, (rows, vocab, dtype, labelled, backward), tags, **about)


def plain_specs() -> list[Spec]:
    """Rows x vocabulary in both dtypes."""
    both = ("fp32", "bf16")
    specs = [
        plain(256, 32000, "fp32", "compile demo quick smoke"),
        plain(64, 128256, "fp32", "compile demo quick"),
        plain(1024, 1000, "fp32", "compile demo quick smoke"),
        plain(64, 1000, "fp32", "quick"),
        plain(8, 10, "fp32", "demo quick smoke"),
        plain(32, 262144, "fp32"),
        plain(256, 32000, "bf16", "compile demo quick smoke"),
        plain(64, 128256, "bf16", "compile demo quick"),
        plain(1024, 1000, "bf16", "compile demo quick"),
        plain(64, 1000, "bf16"),
        plain(8, 10, "bf16", "quick"),
        plain(32, 262144, "bf16"),
    ]
    specs += [
        plain(
            256,
            32000,
            dtype,
            "compile demo quick smoke" if dtype == "fp32" else "compile quick",
            labelled=True,
        )
        for dtype in both
    ]
    specs += [
        plain(rows, vocab, dtype, "compile", labelled=True)
        for rows, vocab in ((64, 128256), (1024, 1000))
        for dtype in both
    ]
    specs += [plain(8, 10, dtype, "demo quick" if dtype == "fp32" else "", labelled=True) for dtype in both]
    for dtype in both:
        specs += [
            plain(256, 32000, dtype, "quick smoke" if dtype == "fp32" else "quick", backward=False),
            plain(64, 128256, dtype, backward=False),
            plain(1024, 1000, dtype, backward=False),
            plain(64, 1000, dtype, backward=False),
            plain(8, 10, dtype, "quick" if dtype == "fp32" else "", backward=False),
            plain(32, 262144, dtype, backward=False),
            plain(256, 32000, dtype, labelled=True, backward=False),
        ]
    return specs


def specs() -> list[Spec]:
    """All cases of kd."""
    listed = plain_specs()
    known = {spec.key for spec in listed}
    # Rows at a fixed vocabulary, for the line; vocabularies with outputs of one size, just below and above 32 MiB.
    scans = [(rows, 32000) for rows in (8, 32, 64, 128, 192)] + [(rows, 1000) for rows in (1, 4, 16, 256)]
    scans += [
        (8128, 1000),
        (2032, 4000),
        (508, 16000),
        (254, 32000),
        (127, 64000),
        (31, 262144),
        (263, 32000),
    ]
    for rows, vocab in scans:
        tags = "quick" if (rows, vocab) in ((8, 32000), (64, 32000), (254, 32000), (31, 262144)) else ""
        spec = plain(rows, vocab, "fp32", tags)
        if spec.key not in known:
            listed.append(replace(spec, about=spec.about | {"group": "scan"}))
    for dtype in DTYPES:
        title = f"kd 4096x32000{' bf16' * (dtype == 'bf16')}, new and given memory"
        about = {"dtype": dtype, "rows": 4096, "vocab": 32000}
        listed.append(make(title, build_cliff, (4096, 32000, dtype), "", group="cliff", **about))
    listed.append(
        make(
            "kd 256x32000, new and given memory",
            build_cliff,
            (256, 32000, "fp32"),
            "quick",
            group="cliff",
            dtype="fp32",
            rows=256,
            vocab=32000,
        )
    )
    for rows, vocab, dtype in (
        (256, 32000, "fp32"),
        (64, 128256, "fp32"),
        (1024, 1000, "fp32"),
        (256, 32000, "bf16"),
    ):
        title = title_of(rows, vocab, dtype) + ", threads"
        tags = "quick" if (vocab, dtype) == (32000, "fp32") else ""
        listed.append(
            make(
                title,
                build_threads,
                (rows, vocab, dtype),
                tags,
                group="threads",
                dtype=dtype,
                rows=rows,
                vocab=vocab,
            )
        )
    if simd_levels():
        for dtype in DTYPES:
            title, tags = (
                title_of(256, 32000, dtype) + ", SIMD levels",
                "quick smoke" if dtype == "fp32" else "",
            )
            listed.append(
                make(
                    title,
                    build_simd,
                    (256, 32000, dtype),
                    tags,
                    group="simd",
                    dtype=dtype,
                    rows=256,
                    vocab=32000,
                )
            )
    for rows, vocab, tags in ((256, 32000, "demo quick"), (64, 128256, "")):
        title = f"kd {rows}x{vocab}, variants"
        listed.append(
            make(
                title,
                build_variants,
                (rows, vocab),
                tags,
                group="variants",
                dtype="fp32",
                rows=rows,
                vocab=vocab,
            )
        )
    return listed
