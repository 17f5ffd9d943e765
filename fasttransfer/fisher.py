"""``fisher_importance``: how much each weight matters to a trained model, for ``L2SP(importance=...)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fasttransfer.checks import check_choice, check_count
from fasttransfer.names import check_patterns, collect, matches
from fasttransfer.progress import progress_bar

_LABELS = ("model", "data")

# Of one batch of one sample: what the model returned and the label -> a scalar.
Loss = Callable[[Any, Tensor], Tensor]


def fisher_importance(
    model: nn.Module,
    batches: Iterable[Sequence[Tensor]],
    *,
    labels: str = "model",
    loss: Loss = F.cross_entropy,
    samples: int | None = None,
    chunk: int = 16,
    include: str | Sequence[str] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> dict[str, Tensor]:
    r"""The diagonal of the Fisher information: the mean over samples of the *per-sample* gradients' squares.

    ``F_i = mean over x of (d log p(y | x) / d theta_i)^2``. Kirkpatrick et al., "Overcoming catastrophic forgetting in
    neural networks" (2017), eq. 3, whose ``lambda/2 F_i (theta_i - theta0_i)^2`` is ``L2SP(model, lambda / 2,
    importance=F)``. (The square of a batch's mean gradient, which is often taken for it, is smaller by up to the
    batch size and goes to 0 where the model has been trained.)

    Args:
        model: Put into eval mode meanwhile, and back into its modes. Its trained parameters (``requires_grad``) are
            looked at.
        batches: ``(inputs [N, ...], labels [N, ...])`` each, such as a DataLoader; with ``labels="model"`` batches
            may be inputs alone. Moved to the model's device.
        labels: ``"model"``: one label per sample is drawn from the model's own softmax over the last dimension of
            ``[N, V]`` (the Fisher information as it is defined). ``"data"``: those of the batches ("empirical
            Fisher").
        loss: Of the model's output for a batch of one sample and its label ``[1, ...]``: a negative log-likelihood.
        samples: At most so many; None: all.
        chunk: Samples whose gradients are in memory at a time: ``chunk`` times the parameters' bytes.
        include: Glob pattern(s) over parameter names; default: all.
        seed: Of the drawn labels.
        progress: Whether to show a bar; None: if rich is installed and stderr is a terminal.

    Returns:
        ``{name: F}`` with the parameters' shapes and devices, float32 (float64 for float64), at least 0.

    Raises:
        TypeError: An argument or a batch of the wrong type.
        ValueError: No samples, nothing to look at, an output of another shape than ``[N, V]`` to draw labels from.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("labels", labels, _LABELS)
    if not callable(loss):
        raise TypeError(f"loss must be callable, got {type(loss).__name__}")
    if samples is not None:
        check_count("samples", samples)
    check_count("chunk", chunk)
    found = collect("model", model)
    patterns = check_patterns("include", include, found.aliases)
    params = {
        name: p.detach()
        for name, p in found.tensors.items()
        if p.requires_grad and (include is None or any(matches(n, patterns) for n in found.names_of(name)))
    }
    if not params:
        raise ValueError("model has no trained parameters to look at")
    rest = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    rest = {name: t.detach() for name, t in rest.items() if name not in params}

    def one(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, {**rest, **own}, (x[None],)), y[None])

    gradients = vmap(grad(one), in_dims=(None, 0, 0))
    sums = {name: torch.zeros_like(p, dtype=_wide(p)) for name, p in params.items()}
    device = next(iter(params.values())).device
    drawn = torch.Generator(device).manual_seed(seed)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    count = 0
    try:
        with torch.no_grad(), progress_bar(samples, "fisher_importance", progress) as bar:
            for batch in batches:
                x, y = _split(batch, labels)
                if y is not None and len(y) != len(x):
                    raise ValueError(f"a batch holds {len(x)} inputs and {len(y)} labels")
                x = x.to(device) if samples is None else x[: samples - count].to(device)
                for i in range(0, len(x), chunk):
                    part = x[i : i + chunk]
                    of_part = _drawn(model(part), drawn) if y is None else y[i : i + len(part)].to(device)
                    for name, g in gradients(params, part, of_part).items():
                        sums[name] += g.to(sums[name].dtype).square().sum(0)
                    bar.advance(len(part))
                count += len(x)
                if samples is not None and count >= samples:
                    break
    finally:
        for module, mode in modes:
            module.training = mode
    if count == 0:
        raise ValueError("batches held no samples")
    return {name: total / count for name, total in sums.items()}


def _wide(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _split(batch: Any, labels: str) -> tuple[Tensor, Tensor | None]:
    if labels == "model":
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(x, Tensor):
            raise TypeError(f"a batch must begin with a tensor of inputs, got {type(x).__name__}")
        return x, None
    if not (
        isinstance(batch, (tuple, list)) and len(batch) >= 2 and all(isinstance(t, Tensor) for t in batch[:2])
    ):
        raise TypeError("with labels='data' a batch must be (inputs, labels), two tensors")
    return batch[0], batch[1]


def _drawn(output: Any, generator: torch.Generator) -> Tensor:
    if not isinstance(output, Tensor) or output.dim() != 2:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"labels are drawn from logits [N, V], the model returned {got}: pass labels='data'")
    return torch.multinomial(torch.softmax(output.float(), -1), 1, generator=generator)[:, 0]
