"""transformers' Trainer with batches, models and outputs that are not the usual ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasttransfer import TeacherCache, TeacherCacheWriter
from tests.trainer_runs import OPTIONS, VOCABULARY, collate, llama, losses_of, sentences, tf, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore")


def labelled(side):
    """As ``DataCollatorForLanguageModeling``: the first token of an example has a label, too."""

    def pad(examples):
        batch = collate(examples, side)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    return pad


@pytest.mark.parametrize("mode", ["logits", "fused head", "cache"])
def test_padding_on_the_left_is_not_a_row(mode, tmp_path):
    """The pad before the first token counts no more than it would on the right."""
    teacher, source = llama(1, 24), None
    if mode == "cache":
        with (
            TeacherCacheWriter(tmp_path / "cache", k=8, vocab_size=VOCABULARY) as writer,
            torch.no_grad(),
        ):
            for example in sentences():
                writer.add(teacher(example["input_ids"][None]).logits[0])
        source = TeacherCache(tmp_path / "cache")
    runs = {}
    for side in ("right", "left"):
        trainer = trainer_of(
            llama(0), tmp_path, teacher=source or teacher, distillation=OPTIONS, fused_head=mode == "fused head",
            collator=labelled(side), gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train()
        runs[side] = losses_of(trainer)
    torch.testing.assert_close(runs["left"], runs["right"], rtol=1e-6, atol=0)


def test_a_cache_of_other_examples(tmp_path):
    with TeacherCacheWriter(tmp_path / "cache", k=4, vocab_size=VOCABULARY) as writer:
        writer.add(torch.randn(6, VOCABULARY))
    trainer = trainer_of(llama(0), tmp_path, teacher=TeacherCache(tmp_path / "cache"), distillation=OPTIONS)
    with pytest.raises(ValueError, match=r"column 'teacher_row' leads to row 1[0-9] of a cache of 6 rows"):
        trainer.train()


class Plain(nn.Module):
    """Of torch alone: a forward without labels, and the logits themselves."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def forward(self, input_ids):
        return self.head(self.embedding(input_ids))


def test_a_model_that_gives_its_logits_alone(tmp_path):
    """Its labels are not removed with the columns that it does not take, and it is evaluated with them."""
    torch.manual_seed(0)
    model, teacher = Plain().double(), Plain().double()
    data = [x | {"labels": x["input_ids"]} for x in sentences()[:2]]

    def pad(examples):
        return collate(examples, labelled=False, index=False) | {
            "labels": nn.utils.rnn.pad_sequence([x["labels"] for x in examples], True, -100)
        }

    trainer = trainer_of(
        model, tmp_path, teacher=teacher, distillation=OPTIONS, shift_labels=True, collator=pad, max_steps=1,
        eval_dataset=data,
    )  # fmt: skip
    trainer.train_dataset = data
    batch = pad(data)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    s, t = (m(batch["input_ids"])[:, :-1][counted].detach() for m in (model, teacher))
    kl = 4 * F.kl_div(
        (s / 2).log_softmax(-1), (t / 2).log_softmax(-1), reduction="batchmean", log_target=True
    )
    expected = (0.3 * F.cross_entropy(s, labels[counted]) + 0.7 * kl).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert trainer.predict(data).predictions.shape == (2, 9, VOCABULARY)
    trainer.train()
    assert losses_of(trainer) == pytest.approx([expected], rel=1e-6)


class Holding(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask)


def test_refused(tmp_path):
    model = llama(0)
    with pytest.raises(ValueError, match="teacher holds the model that is trained"):
        trainer_of(model, tmp_path, teacher=Holding(model), distillation=OPTIONS)
    bare = tf.LlamaModel(model.config).double()
    with pytest.raises(ValueError, match="must give logits, got outputs of last_hidden_state"):
        trainer_of(model, tmp_path, teacher=bare, distillation=OPTIONS).train()
