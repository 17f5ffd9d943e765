"""``DistillationMixin``: ``transformers.Trainer`` with a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fasttransfer.checks import check_flag
from fasttransfer.integrations.transformers.base import CAUSAL_LM_CLASSES, Trainer, shifting_loss
from fasttransfer.integrations.transformers.rows import Layout, rows_of
from fasttransfer.integrations.transformers.teachers import (
    Batch,
    CachedTeacher,
    HiddenTeacher,
    LogitsTeacher,
    accepted,
    base_model,
)
from fasttransfer.teacher_cache import TeacherCache

# Read by the trainer itself, or by Liger's forwards; no model of a distillation is given them.
_NOT_INPUTS = ("labels", "shift_labels", "num_items_in_batch", "skip_logits")


class DistillationMixin:
    """Makes a ``transformers.Trainer``, or a subclass, train the student ``model`` by a teacher.

    ``class MyTrainer(DistillationMixin, SomeTrainer)``; ``DistillationTrainer`` is that of ``Trainer``. The loss is
    ``kd_loss``'s, in training and in evaluation:

    - of the teacher's logits (``kd_loss``);
    - with ``fused_head=True`` of both models' hidden states and heads (``linear_kd_loss``): the logits of all rows are
      in memory on neither side. The models' heads (``get_output_embeddings()``) are plain linear layers;
    - of a ``TeacherCache`` (``topk_kd_loss``): no teacher is run. The dataset's ``row_column`` says which rows.

    Labels of causal language models are shifted, logits never. The divisor is the number of rows that count in all
    batches of an optimizer step, over all processes (``average_tokens_across_devices``): steps are those of one large
    batch, whatever ``gradient_accumulation_steps`` is. Rows labelled -100 (``ignore_index``) do not count; without
    labels those of the attention mask do (causal models), or one per example. A row whose own token
    is padding does not count, on the left either, where it stands before a label. With ``ignored_rows="distill"``
    padding is told by the attention mask.

    Args:
        teacher: A model, or a ``TeacherCache``. A model is put on the Trainer's device (unless it has a device map or
            is quantized), and runs in eval mode, without a graph, under the Trainer's autocast. It is not saved. It
            takes the student's inputs, and those that only it has.
        distillation: Options of ``KDLoss``, with ``fused_head`` of ``LinearKDLoss``, with a cache of ``TopKKDLoss``
            (``tail``; its form is that of log-probabilities): ``{"temperature": 2.0, "label_weight": 0.5}``. None of
            them has another default here: batches with labels need ``label_weight``, different widths ``vocab_size``.
            ``TrainingArguments(label_smoothing_factor=)`` is taken as ``label_smoothing``.
        fused_head: Whether to take hidden states and heads.
        row_column: The column of the dataset that has, of each example, the number of its first row in the cache (its
            other tokens follow, padding left out), or one number per token. The evaluation's dataset has it too.
        shift_labels: Whether row t of the logits predicts token t + 1. None: as the model's own loss; it must be given
            for a model that is not transformers'.

    Further arguments are the Trainer's. In evaluation without predictions ``fused_head`` holds too; where logits are
    asked for (``compute_metrics``, ``predict``) they are made.

    Raises:
        TypeError, ValueError: Bad arguments; a teacher that is the student, ``compute_loss_func``, context or sequence
            parallelism, ``fused_head`` with DataParallel or ``torch_compile``. In the first step, of ``fused_head``:
            logits that are not what the head gives (Gemma's softcap: pass ``softcap``).

    Example:
        >>> trainer = DistillationTrainer(student, args, train_dataset=data, data_collator=collator, teacher=teacher,
        ...                               distillation={"temperature": 2.0, "label_weight": 0.5})
    """

    # What compute_loss gives is divided by the rows of all accumulated batches; the Trainer divides no further.
    loss_is_scaled_for_ga = True
    # Of the Trainer.
    accelerator: Any
    args: Any
    model: Any
    label_names: Any
    _prepare_inputs: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | TeacherCache,
        distillation: Mapping[str, Any] | None = None,
        fused_head: bool = False,
        row_column: str = "teacher_row",
        shift_labels: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(row_column, str):
            raise TypeError(f"row_column must be the name of a column, got {row_column!r}")
        if shift_labels is not None:
            check_flag("shift_labels", shift_labels)
        options = {} if distillation is None else distillation
        self._make(teacher, options, check_flag("fused_head", fused_head), row_column)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func was given, but the loss is that of the distillation")
        super().__init__(*args, **kwargs)
        # Empty for models that are not transformers': the Trainer would remove labels and evaluate without them.
        self.label_names = self.label_names or ["labels"]
        self._loss_only = False
        self._check_trainer(teacher, fused_head)
        factor = self.args.label_smoothing_factor
        if factor and options.get("label_smoothing", factor) != factor:
            raise ValueError(
                f"label_smoothing={options['label_smoothing']} in distillation, label_smoothing_factor={factor} in the "
                "arguments: give one of them"
            )
        if factor:
            options = {**options, "label_smoothing": factor}
        self._teacher = self._make(teacher, options, fused_head, row_column)
        self._layout = layout_of(self._student(), shift_labels)
        # Of versions without loss_is_scaled_for_ga: the loss is divided by the count that it is given.
        self.model_accepts_loss_kwargs = True
        if isinstance(teacher, nn.Module):
            placed = getattr(teacher, "hf_device_map", None) or getattr(teacher, "quantization_method", None)
            if not placed:
                teacher.to(self.args.device)

    @staticmethod
    def _make(teacher: Any, options: Any, fused_head: bool, row_column: str) -> Any:
        if isinstance(teacher, TeacherCache):
            if fused_head:
                raise ValueError("fused_head needs a teacher with a head, and this one is a TeacherCache")
            return CachedTeacher(teacher, options, row_column)
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"teacher must be a model or a TeacherCache, got {type(teacher).__name__}")
        return (HiddenTeacher if fused_head else LogitsTeacher)(teacher, options)

    def _check_trainer(self, teacher: Any, fused_head: bool) -> None:
        if isinstance(teacher, nn.Module) and any(m is teacher for m in self.model.modules()):
            raise ValueError("teacher is the model that is trained, or a part of it: give a copy")
        if isinstance(teacher, nn.Module) and any(m is self.model for m in teacher.modules()):
            raise ValueError(
                "teacher holds the model that is trained, and would put it into eval mode: give a copy"
            )
        plan = getattr(self.accelerator, "parallelism_config", None)
        for name in ("cp_enabled", "sp_enabled"):
            if getattr(plan, name, False):
                raise ValueError(
                    "distillation with context or sequence parallelism: rows of one example would be on other processes"
                )
        if fused_head and (self.args.n_gpu > 1 or self.args.torch_compile):
            what = "torch_compile" if self.args.torch_compile else "DataParallel (torchrun starts DDP)"
            raise ValueError(
                f"fused_head cannot be used with {what}: the head's forward is replaced for each batch"
            )

    def _student(self) -> nn.Module:
        """The model without its wrappers."""
        return self.accelerator.unwrap_model(self.model)

    # ------------------------------------------------------------------------------------------------------ loss
    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The distillation loss of a batch; the Trainer's arguments.

        In training mode it is divided by ``num_items_in_batch`` as ``get_batch_samples`` counts it, in evaluation by
        the rows of the batch.
        """
        student = self._student()
        kept = dict(inputs)
        rows = rows_of(kept, self._layout, self._teacher.options)
        numbers = kept.pop(getattr(self._teacher, "column", ""), None)
        if (
            "decoder_input_ids" not in kept
            and "decoder_inputs_embeds" not in kept
            and rows.labels is not None
        ):
            make: Any = getattr(student, "prepare_decoder_input_ids_from_labels", None)
            if make is not None:  # what the model's own forward makes of labels, which it is not given
                kept["decoder_input_ids"] = make(labels=rows.labels)
        for name in _NOT_INPUTS:
            kept.pop(name, None)
        items: Any = num_items_in_batch if model.training else None
        whole = return_outputs and not self._loss_only
        batch = Batch(kept, rows, items, numbers)
        loss, outputs = self._teacher(model, student, batch, self.accelerator.autocast, whole=whole)
        if isinstance(outputs, Tensor):
            outputs = (outputs,)
        if isinstance(outputs, tuple):
            outputs = (loss, *outputs)  # where prediction_step skips it
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Tensor | None]:
        """The batches of an optimizer step, as the Trainer has it, and the number of their rows that count.

        The Trainer's own number is of labels that its models' losses count, and None for batches without.
        """
        batches, _ = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if not batches:
            return batches, None
        options = self._teacher.options
        counts = torch.stack([rows_of(batch, self._layout, options).counted(options) for batch in batches])
        total = counts.sum(0).to(self.args.device, torch.float32)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            # Gradients are averaged over the processes, so that each divides by the average of their counts.
            total = self.accelerator.reduce(total, reduction="mean")
        return batches, total

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """The Trainer's; here batches without labels have a loss, too, where nothing else is asked for."""
        if any(inputs.get(name) is None for name in self.label_names):
            if prediction_loss_only:
                with torch.no_grad():
                    return self.compute_loss(model, self._prepare_inputs(inputs)), None, None
            inputs = self._teacher.student_inputs(self._student(), inputs)
        self._loss_only = bool(prediction_loss_only)
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)  # type: ignore[misc]
        finally:
            self._loss_only = False

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns that the teacher needs, too."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        teacher = self._teacher
        more = [teacher.column] if isinstance(teacher, CachedTeacher) else sorted(accepted(teacher.model)[0])
        self._signature_columns += [name for name in more if name not in self._signature_columns]


def layout_of(model: nn.Module, shift: bool | None) -> Layout:
    """Of a model; ``shift`` None: as its own loss.

    Raises:
        ValueError: It is not known.
    """
    inner = base_model(model)
    encoder_decoder = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    mask = "decoder_attention_mask" if encoder_decoder else "attention_mask"
    if shift is not None:
        return Layout(shift, mask)
    # By the class first: GPT2LMHeadModel and others have no loss_type, and their loss shifts.
    if type(inner).__name__ in CAUSAL_LM_CLASSES:
        return Layout(True, mask)
    loss_type = getattr(inner, "loss_type", None)
    if loss_type is None:
        raise ValueError(
            f"{type(inner).__name__} does not say whether row t of its logits predicts token t + 1: pass shift_labels"
        )
    return Layout(shifting_loss(loss_type) and not encoder_decoder, mask)


class DistillationTrainer(DistillationMixin, Trainer):
    """``transformers.Trainer`` with a teacher: see ``DistillationMixin``."""
