"""``sweep_alpha`` chooses alpha by validation, ``kfold_search`` a hyperparameter of training by cross-validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fasttransfer.blend import Coefficient, Transform, blend
from fasttransfer.checks import check_count, check_flag, check_number, shape
from fasttransfer.line import ModelLine
from fasttransfer.names import Tensors
from fasttransfer.progress import progress_bar

_INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.bool,
)

_ENDED = object()

# A generator function: value, training indices, validation indices -> a score after each round.
Fit = Callable[[Any, Tensor, Tensor], Iterator[Any]]


class AlphaSweep(NamedTuple):
    """The result of ``sweep_alpha``."""

    alphas: list[float]
    scores: list[float]
    best_alpha: float
    best_score: float


class KFoldSearch(NamedTuple):
    """The result of ``kfold_search``. Lists are in the order of ``values``."""

    best: Any
    rounds: int  # at which the mean score of ``best`` was best: train that long on all data
    score: float  # that mean
    values: list[Any]
    curves: list[list[float]]  # per value the mean score of each round
    fold_scores: list[list[list[float]]]  # per value and round the score of each fold


def sweep_alpha(
    target: Tensors,
    source: Tensors,
    alphas: Iterable[float],
    evaluate: Callable[[Any], Any],
    *,
    source_scale: Coefficient | None = None,
    transform: Transform = None,
    maximize: bool = True,
    progress: bool | None = None,
) -> AlphaSweep:
    """Blend with each alpha, evaluate, and say which alpha is best.

    ``evaluate`` must use validation data. A score of test data at the alpha that it has chosen is no estimate of
    anything: evaluate once on the test data, with ``best_alpha``.

    Args:
        target: As in ``blend``; not modified.
        source: As in ``blend``; not modified.
        alphas: The numbers to try. Include 1, the target unchanged.
        evaluate: Takes what was blended and returns a number or a one-element tensor. For a module that is a copy of
            ``target`` (in its train or eval mode) with blended parameters and floating buffers: the same one for all
            alphas, overwritten in one pass over the weights; clone what is to be kept. It may do with it what it likes:
            parameters, buffers, layers, hooks and modes are put back before the next alpha. For tensors what ``blend``
            returns, without a graph.
        source_scale: As in ``blend``.
        transform: As in ``blend``.
        maximize: Whether the highest score is the best (accuracy) or the lowest (loss).
        progress: Whether to show a bar; None: if rich is installed and stderr is a terminal.

    Returns:
        All alphas and scores in the order given, and the best: of equal ones the first. NaN is never the best.

    Raises:
        TypeError, ValueError: As ``blend``; no alphas or one that is no finite number; ``evaluate`` not callable. All
            that before the first evaluation. A score that is no number; only NaN as scores.
    """
    numbers = [check_number(f"alphas[{i}]", a, float("-inf")) for i, a in enumerate(_some("alphas", alphas))]
    if not callable(evaluate):
        raise TypeError(f"evaluate must be callable, got {type(evaluate).__name__}")
    check_flag("maximize", maximize)
    target, source = _lasting(target), _lasting(source)

    @torch.no_grad()
    def blended(alpha: float) -> Any:
        return blend(target, source, alpha, source_scale=source_scale, transform=transform)

    at = ModelLine(target, source, source_scale, transform).at if isinstance(target, nn.Module) else blended
    scores = []
    with progress_bar(len(numbers), "sweep_alpha", progress) as bar:
        for alpha in numbers:
            scores.append(_score("evaluate must return", evaluate(at(alpha))))
            bar.advance()
    best = _best(scores, maximize)
    if best is None:
        raise ValueError("evaluate returned NaN for every alpha")
    return AlphaSweep(numbers, scores, numbers[best], scores[best])


def kfold_search(
    fit: Fit,
    values: Iterable[Any],
    labels: Tensor | int,
    *,
    folds: int = 5,
    patience: int = 3,
    maximize: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> KFoldSearch:
    """Choose a value, such as the strength of ``L2SP``, and how long to train, by k-fold cross-validation.

    For each value one ``fit`` per fold is advanced a round at a time, all folds in step (as ``xgboost.cv`` and
    ``lightgbm.cv`` do); early stopping looks at the mean over the folds. One fold's own best round would be chosen by
    its own noise, and would not say how long to train on all data::

        def training(strength, samples):  # the model after each round
            model = copy.deepcopy(pretrained)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            L2SP(model, strength).attach(optimizer)
            while True:
                for batch in samples[torch.randperm(len(samples))].split(32):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[batch]), y[batch]).backward()
                    optimizer.step()
                yield model

        def fit(strength, train, validation):
            for model in training(strength, train):
                with torch.no_grad():
                    accuracy = (model(x[validation]).argmax(1) == y[validation]).float().mean()
                yield accuracy

        found = kfold_search(fit, [1.0, 0.1, 0.01, 0.0], y)
        models = training(found.best, torch.arange(len(y)))  # on everything, as long as was best
        *_, model = itertools.islice(models, found.rounds)

    Args:
        fit: A generator function ``fit(value, train, validation)`` that trains on the samples ``train`` and yields a
            score (a number or a one-element tensor) of the samples ``validation`` after each round: an epoch, or some
            steps. It may go on for ever: it is closed when it is no longer needed. The indices are sorted int64
            tensors on the CPU. The folds of a value exist at the same time and run in turn, so that draws from the
            global generator depend on their number: take a ``torch.Generator`` per fit if that matters.
        values: What to choose from. Of equal scores the first given wins: begin with the value that is to be
            preferred then, such as the strongest penalty.
        labels: The class of each sample ``[N]``, an integer tensor: the folds are stratified (the numbers of a class
            in two folds differ by at most 1). Or the number of samples.
        folds: At least 2, at most the number of samples.
        patience: A value is done when its mean score has not improved in that many rounds; also when a ``fit`` ends,
            at the last round that all folds have reached.
        maximize: Whether the highest score is the best (accuracy) or the lowest (loss).
        seed: Of the folds, which are the same for all values. The global generator is not touched.
        progress: Whether to show a bar over the values; None: if rich is installed and stderr is a terminal.

    Returns:
        The best value, the number of rounds at which its mean score was best (of equal ones the first), that score,
        and all scores. A mean of NaN is never the best.

    Raises:
        TypeError: ``fit`` that returns no iterator; a score that is no number; labels that are no integers.
        ValueError: No values, or one twice; folds, patience or labels out of range; a fold without any score; only NaN
            as scores; a ``fit`` that yields inside of ``torch.autocast``. What ``fit`` raises is passed on, with the
            generators of the other folds closed.
    """
    if not callable(fit):
        raise TypeError(f"fit must be a generator function, got {type(fit).__name__}")
    candidates = _some("values", values)
    for i, value in enumerate(candidates):
        if any(_equal(value, other) for other in candidates[:i]):
            raise ValueError(f"values must differ, got {value!r} twice")
    check_count("patience", patience)
    check_flag("maximize", maximize)
    splits = kfold_indices(labels, folds=folds, seed=seed)

    fold_scores, curves = [], []
    with progress_bar(len(candidates), "kfold_search", progress) as bar:
        for value in candidates:
            rounds = _cross_validate(fit, value, splits, patience, maximize)
            fold_scores.append(rounds)
            curves.append([_mean(scores) for scores in rounds])
            bar.advance()
    # Each value's best mean, NaN where it has nothing else: then it cannot win.
    tops = [_best(curve, maximize) for curve in curves]
    heights = [math.nan if top is None else curve[top] for top, curve in zip(tops, curves, strict=True)]
    best = _best(heights, maximize)
    if best is None:
        raise ValueError("fit yielded NaN for every value")
    rounds_of_best = curves[best].index(heights[best]) + 1
    return KFoldSearch(candidates[best], rounds_of_best, heights[best], candidates, curves, fold_scores)


def kfold_indices(labels: Tensor | int, *, folds: int = 5, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Stratified folds: each class is shuffled and dealt over the folds, the next class where it ends.

    Args:
        labels: The class of each sample ``[N]``, an integer tensor; or the number of samples.
        folds: At least 2, at most the number of samples.
        seed: Of the shuffling. The global generator is not touched.

    Returns:
        Per fold the indices of training and validation samples: sorted int64 tensors on the CPU. The validation parts
        are disjoint and cover all samples; two of them differ by at most one sample, also within a class.

    Raises:
        TypeError: Labels that are no integers.
        ValueError: folds or seed out of range, labels that are not ``[N]``.
    """
    classes = _classes(labels)
    if check_count("folds", folds, 2) > len(classes):
        raise ValueError(f"folds must be at most the number of samples, {len(classes)}, got {folds}")
    order = torch.randperm(
        len(classes), generator=torch.Generator().manual_seed(check_count("seed", seed, 0))
    )
    order = order[classes[order].argsort(stable=True)]
    held_out = torch.empty_like(order)
    held_out[order] = torch.arange(len(order)) % folds
    return [((held_out != k).nonzero()[:, 0], (held_out == k).nonzero()[:, 0]) for k in range(folds)]


def _cross_validate(
    fit: Fit, value: Any, splits: Sequence[tuple[Tensor, Tensor]], patience: int, maximize: bool
) -> list[list[float]]:
    """The scores of each fold, by round."""
    rounds: list[list[float]] = []
    with ExitStack() as stack:
        fits = []
        for train, validation in splits:
            running = fit(value, train.clone(), validation.clone())  # it may shuffle them in place
            if not isinstance(running, Iterator):
                raise TypeError(
                    f"fit must be a generator function (one that yields its scores), it returned "
                    f"{type(running).__name__}"
                )
            fits.append(running)
            stack.callback(getattr(running, "close", lambda: None))
        while True:
            scores = list(_round(fits))
            if len(scores) < len(fits):
                break
            rounds.append(scores)
            top = _best([_mean(r) for r in rounds], maximize)
            if len(rounds) - (0 if top is None else top + 1) >= patience:
                break
    if not rounds:
        raise ValueError(f"fit must yield at least one score, a fold of the value {value!r} has yielded none")
    return rounds


def _round(fits: Sequence[Iterator[Any]]) -> Iterator[float]:
    """The next score of each fold, up to the first that has none."""
    for running in fits:
        autocast = _autocast()
        # A generator that yields inside of `with torch.no_grad():` would leave that on for the next fold's training.
        with (
            torch.inference_mode(torch.is_inference_mode_enabled()),
            torch.set_grad_enabled(torch.is_grad_enabled()),
        ):
            score = next(running, _ENDED)
            left_on = _autocast() != autocast
        if left_on:  # that cannot be undone: its cache of weights lives until the generator goes on
            raise ValueError(
                "fit must not yield inside of torch.autocast, in which the next fold would be trained"
            )
        if score is _ENDED:
            return
        yield _score("fit must yield", score)


def _autocast() -> list[bool]:
    return [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]


def _classes(labels: Any) -> Tensor:
    """The class of each sample, on the CPU; one class for all if only their number is given."""
    if not isinstance(labels, Tensor):
        if isinstance(labels, bool) or not isinstance(labels, int):
            raise TypeError(
                f"labels must be an integer tensor or the number of samples, got {type(labels).__name__}"
            )
        return torch.zeros(max(labels, 0), dtype=torch.int64)
    if labels.dtype not in _INTEGERS:
        raise TypeError(f"labels must be integers, got {str(labels.dtype).removeprefix('torch.')}")
    if labels.dim() != 1:
        raise ValueError(f"labels must be [N], got {shape(labels)}")
    return labels.detach().cpu().to(torch.int64)


def _some(name: str, values: Any) -> list[Any]:
    """The values as a list that is not empty; those of a tensor as numbers."""
    if isinstance(values, Tensor) and values.dim() == 1:
        values = values.tolist()
    if isinstance(values, (Tensor, str)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of values, got {type(values).__name__}")
    found = list(values)
    if not found:
        raise ValueError(f"{name} must hold at least one value, got none")
    return found


def _equal(a: Any, b: Any) -> bool:
    try:
        return bool(a == b)
    except (ValueError, RuntimeError):  # arrays and tensors compare by element
        return a is b


def _lasting(tensors: Tensors) -> Tensors:
    """What can be read once per alpha: an iterator as a list."""
    return list(tensors) if isinstance(tensors, Iterator) else tensors


def _score(what: str, value: Any) -> float:
    """A score, which may be NaN or infinite, as a float."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value.item())
    if isinstance(value, Real):  # NumPy's scalars too
        return float(value)
    given = f"a tensor of shape {shape(value)}" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"{what} a number or a one-element tensor, got {given}")


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)


def _best(scores: Sequence[float], maximize: bool) -> int | None:
    """The position of the best score, the first of equal ones; None if all are NaN."""
    known = [i for i, s in enumerate(scores) if not math.isnan(s)]
    sign = 1 if maximize else -1
    return max(known, key=lambda i: sign * scores[i], default=None)
