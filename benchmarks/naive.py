"""The code people write today, frozen, as its users write it.

Every speed claim of this project is a ratio to one of these functions, measured in the same run. They are not
straw men: each is the usual form of the formula in public training code, and the docstring says where. Nobody
"improves" this file: a faster formulation is a further provider of the benchmark, not a change here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Temperature-softmax KL distillation of `student` [rows, V] from `teacher` [rows, V]; a scalar.

    Hinton et al. 2015 in the form of `DistillKL` in RepDistiller (`distiller_zoo/KD.py`), where the sum is
    divided by the batch size and multiplied by T^2, with `reduction="batchmean"` for today's torch.
    """
    return (
        F.kl_div(
            F.log_softmax(student / temperature, dim=-1),
            F.softmax(teacher / temperature, dim=-1),
            reduction="batchmean",
        )
        * temperature
        * temperature
    )


def kd_with_labels(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, label_weight: float
) -> Tensor:
    """`label_weight * CE + (1 - label_weight) * T^2 * KL`; `labels` [rows] int64; a scalar.

    `loss_fn_kd` in haitongli/knowledge-distillation-pytorch (`model/net.py`), copied into very many student
    projects: the KL term times T^2 plus `F.cross_entropy`. (There the KL is a mean over elements by torch's
    default; here it is `batchmean`, the correction of it that torch's own documentation asks for.)
    """
    soft = F.kl_div(
        F.log_softmax(student / temperature, dim=-1),
        F.softmax(teacher / temperature, dim=-1),
        reduction="batchmean",
    )
    hard = F.cross_entropy(student, labels)
    return label_weight * hard + (1.0 - label_weight) * soft * temperature * temperature


def linear_kd(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    temperature: float,
) -> Tensor:
    """`kd` of the logits that two language models' heads make of their hidden states; a scalar.

    What a trainer has when the model returns logits (`GKDTrainer` of TRL without its fused loss): both heads applied
    to all tokens, the teacher's under `no_grad`.
    """
    with torch.no_grad():
        teacher = F.linear(teacher_hidden, teacher_head)
    return kd(F.linear(student_hidden, student_head), teacher, temperature)


def topk_kd(student: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Forward KL over the teacher's k largest outputs; `values` [rows, k] log-probabilities, `indices` [rows, k].

    `compute_forward_kl_topk` of verl (`trainer/distillation/fsdp/losses.py`): the whole log-softmax of the student,
    gathered at the teacher's indices; what the teacher has elsewhere is left out. Its mean over tokens.
    """
    log_p = F.log_softmax(student, dim=-1)
    log_p = torch.gather(log_p, dim=-1, index=indices).float()
    log_q = values.float()
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1).mean()


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """`KL(student || teacher)`, both [rows, V]: the mean over rows.

    MiniLLM's and DistiLLM's `reverse_kl` (`distillm/losses.py`), without their masks of infinities and tokens.
    """
    log_p = F.log_softmax(student, dim=-1)
    log_q = F.log_softmax(teacher, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def jsd(student: Tensor, teacher: Tensor, beta: float = 0.5) -> Tensor:
    """The generalized Jensen-Shannon divergence, both [rows, V]: the mean over rows.

    `generalized_jsd_loss` of TRL's GKDTrainer, at temperature 1.
    """
    student_log_probs = F.log_softmax(student, dim=-1)
    teacher_log_probs = F.log_softmax(teacher, dim=-1)
    weight = torch.tensor(beta, dtype=student_log_probs.dtype, device=student.device)
    mixture_log_probs = torch.logsumexp(
        torch.stack([student_log_probs + torch.log1p(-weight), teacher_log_probs + torch.log(weight)]), dim=0
    )
    kl_teacher = F.kl_div(mixture_log_probs, teacher_log_probs, reduction="none", log_target=True)
    kl_student = F.kl_div(mixture_log_probs, student_log_probs, reduction="none", log_target=True)
    return (weight * kl_teacher + (1 - weight) * kl_student).sum(-1).mean()


def tvd(student: Tensor, teacher: Tensor) -> Tensor:
    """The total variation distance, both [rows, V]: the mean over rows.

    DistiLLM's `tv_distance` (`distillm/losses.py`), without its masks.
    """
    p = F.softmax(student, dim=-1)
    q = F.softmax(teacher, dim=-1)
    return (0.5 * (p - q).abs()).sum(-1).mean()


def l2sp(params: Sequence[Tensor], start: Sequence[Tensor], strength: float) -> Tensor | float:
    """`strength * sum ||p - p0||^2` over two lists of equal shapes; a scalar to call `.backward()` on.

    The loop over parameters of `SPRegularization` in the Transfer-Learning-Library
    (`tllib/regularization/delta.py`), with a squared sum in place of its `0.5 * torch.norm(...) ** 2`.
    """
    penalty: Tensor | float = 0.0
    for p, p0 in zip(params, start):
        penalty = penalty + (p - p0).pow(2).sum()
    return strength * penalty


@torch.no_grad()
def blend(target: Sequence[Tensor], source: Sequence[Tensor], alpha: float) -> None:
    """`target = alpha * target + (1 - alpha) * source`, tensor by tensor, written back into `target`.

    The interpolation of two checkpoints in WiSE-FT (`src/wise_ft.py`): a dict comprehension over the two
    `state_dict`s, then `load_state_dict`, which copies the new tensors into the model.
    """
    blended = [alpha * t + (1.0 - alpha) * s for t, s in zip(target, source)]
    for t, new in zip(target, blended):
        t.copy_(new)


@torch.no_grad()
def ema(average: Sequence[Tensor], model: Sequence[Tensor], decay: float) -> None:
    """`average = decay * average + (1 - decay) * model`, in place, once per training step.

    `v.mul_(decay).add_(model_v, alpha=1 - decay)` in a loop: the usual `ModelEMA.update` of detection and
    diffusion training code, and NeMo's.
    """
    for avg, p in zip(average, model):
        avg.mul_(decay).add_(p, alpha=1.0 - decay)


@torch.no_grad()
def blend_many(target: Sequence[Tensor], sources: Sequence[Sequence[Tensor]], alpha: float) -> None:
    """`target = alpha * target + (1 - alpha) * mean(sources)`, written back into `target`.

    The uniform soup of mlfoundations/model-soups (`main.py`): `v * (1/N)`, then `v * (1/N) + soup[k]` for
    every further checkpoint, then mixed into the target and loaded as in `blend`.
    """
    share = 1.0 / len(sources)
    soup = [v * share for v in sources[0]]
    for source in sources[1:]:
        soup = [v * share + mixed for v, mixed in zip(source, soup)]
    blend(target, soup, alpha)
