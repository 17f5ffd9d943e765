"""Runs of transformers' Trainer, and the loop written by hand: for both files of tests."""

from __future__ import annotations

import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tf = pytest.importorskip(
        "transformers", reason="the mixin and the callbacks are for transformers' Trainer"
    )
    pytest.importorskip("accelerate", reason="transformers' Trainer needs it")
    pytest.importorskip("safetensors", reason="the teacher's cache needs it")

import fasttransfer.integrations.transformers as integration

tf.logging.set_verbosity_error()

VOCABULARY, LENGTHS = 40, (5, 9, 4, 8, 3, 7, 6)
EPOCHS = 2
OPTIONS = {"temperature": 2.0, "label_weight": 0.3}
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, 0.5, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, 0.01, weight_decay=0.01),
}


def llama(seed, width=32, columns=VOCABULARY, kind=tf.LlamaForCausalLM, **options):
    """In float64: what differs from the formula is then no rounding."""
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=columns, hidden_size=width, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, pad_token_id=0, **options,
    )  # fmt: skip
    return kind(config).double()


def sentences():
    """Of different lengths, the first token without a label as of a prompt; ``teacher_row``: the first one's."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in LENGTHS]
    first = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    return [{"input_ids": ids, "teacher_row": row} for ids, row in zip(rows, first, strict=True)]


def collate(examples, side="right", labelled=True, index=True):
    width = max(len(x["input_ids"]) for x in examples)

    def padded(ids, value):
        missing = (0, width - len(ids)) if side == "right" else (width - len(ids), 0)
        return F.pad(ids, missing, value=value)

    ids = torch.stack([padded(x["input_ids"], 0) for x in examples])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if labelled:
        prompts = [F.pad(x["input_ids"][2:], (2, 0), value=-100) for x in examples]
        batch["labels"] = torch.stack([padded(labels, -100) for labels in prompts])
    if index and "teacher_row" in examples[0]:  # the Trainer removes it where it is of no use
        batch["teacher_row"] = torch.tensor([x["teacher_row"] for x in examples])
    return batch


OWN = ("teacher", "distillation", "fused_head", "shift_labels", "row_column", "eval_dataset")


def trainer_of(
    model,
    tmp_path,
    *callbacks,
    optimizer="sgd",
    kind=integration.DistillationTrainer,
    collator=collate,
    **options,
):
    """The Trainer, of OWN and of TrainingArguments."""
    own = {name: options.pop(name) for name in OWN if name in options}
    options = {
        "num_train_epochs": EPOCHS, "logging_steps": 1, "save_strategy": "no", "max_grad_norm": 0.5,
    } | options  # fmt: skip
    args = tf.TrainingArguments(
        str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=2,
        per_device_eval_batch_size=2, train_sampling_strategy="sequential", lr_scheduler_type="constant", **options,
    )  # fmt: skip
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    trainer = kind(
        model, args, train_dataset=sentences(), data_collator=collator, callbacks=list(callbacks),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)), **own,
    )  # fmt: skip
    trainer.remove_callback(tf.PrinterCallback)
    return trainer


def losses_of(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same(ours, theirs, tolerance=0.0):
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        torch.testing.assert_close(t, theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def groups(accumulate, size=2):
    """The batches of each optimizer step of an epoch."""
    data = sentences()
    batches = [collate(data[i : i + size]) for i in range(0, len(data), size)]
    return [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]


def by_hand(model, loss_of, optimizer="sgd", accumulate=1, before=None, after=None, clip=0.5):
    """The loop that the Trainer stands for; ``before`` is behind clipping. The loss of every step."""
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    seen = []
    for batches in groups(accumulate) * EPOCHS:
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        optimizer.zero_grad()
        seen.append(0.0)
        for batch in batches:
            loss = loss_of(model, batch, items)
            loss.backward()
            seen[-1] += loss.item()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        if before is not None:
            before()
        optimizer.step()
        if after is not None:
            after(optimizer)
    return seen


class Own(tf.Trainer):
    """The Trainer as it is, with the model's own loss."""
