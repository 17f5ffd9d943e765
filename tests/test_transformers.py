"""transformers' Trainer with a teacher: beside the loop written by hand, step for step."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasttransfer import TeacherCache, TeacherCacheWriter
from tests.trainer_runs import (
    OPTIONS,
    VOCABULARY,
    Own,
    assert_same,
    by_hand,
    collate,
    groups,
    integration,
    llama,
    losses_of,
    sentences,
    tf,
    trainer_of,
    weights,
)

DistillationTrainer = integration.DistillationTrainer
pytestmark = pytest.mark.filterwarnings("ignore")


def rows_loss(student, teacher, labels, temperature=1.0, weight=0.0, smoothing=0.0):
    """The sum of ``kd_loss`` over rows ``[n, V]``, from the formula."""
    log_p = F.log_softmax(student / temperature, -1)
    log_q = F.log_softmax(teacher / temperature, -1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2
    if labels is None:
        return kl.sum()
    ce = F.cross_entropy(student, labels, reduction="none", label_smoothing=smoothing)
    return (weight * ce + (1 - weight) * kl).sum()


def batch_loss(student, teacher, batch, items, **options):
    """Of one batch of ``collate``, the logits shifted as everybody writes it."""
    with torch.no_grad():
        teacher_logits = teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    return (
        rows_loss(logits[:, :-1][counted], teacher_logits[:, :-1][counted], labels[counted], **options)
        / items
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Of all columns: what it says is then what the teacher says."""
    folder = tmp_path_factory.mktemp("cache")
    teacher = llama(1, 24)
    with (
        TeacherCacheWriter(folder, k=VOCABULARY, vocab_size=VOCABULARY, dtype=torch.float32) as writer,
        torch.no_grad(),
    ):
        for example in sentences():
            writer.add(teacher(example["input_ids"][None]).logits[0])
    return TeacherCache(folder)


# ---------------------------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mode", ["logits", "fused head", "cache"])
def test_distillation_is_the_loop(mode, accumulate, cache, tmp_path):
    """Padded batches of different sizes, the last step of an epoch with fewer of them, clipping."""
    teacher = llama(1, 24)
    source = cache if mode == "cache" else teacher
    model = llama(0)
    trainer = trainer_of(
        model, tmp_path, teacher=source, distillation=OPTIONS, fused_head=mode == "fused head",
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    trainer.train()
    hand = llama(0)
    seen = by_hand(
        hand,
        lambda student, batch, items: batch_loss(student, teacher, batch, items, temperature=2.0, weight=0.3),
        accumulate=accumulate,
    )
    # The cache's values are float32. What is logged comes through a float32 sum.
    torch.testing.assert_close(losses_of(trainer), seen, rtol=1e-6, atol=0)
    assert_same(weights(model), weights(hand), 1e-6 if mode == "cache" else 1e-12)
    assert (hand.lm_head.weight - llama(0).lm_head.weight).abs().max() > 1e-2


@pytest.mark.parametrize("fused_head", [False, True])
def test_other_ways_to_train(fused_head, tmp_path):
    """Gradient checkpointing changes nothing; bfloat16 autocast only roundings."""

    def run(**options):
        model = llama(0).float()
        trainer = trainer_of(
            model,
            tmp_path,
            teacher=llama(1, 24).float(),
            distillation=OPTIONS,
            fused_head=fused_head,
            **options,
        )
        trainer.train()
        return losses_of(trainer), weights(model)

    losses, plain = run()
    again, checkpointed = run(gradient_checkpointing=True)
    assert again == losses
    assert_same(checkpointed, plain)
    rounded, _ = run(bf16=True)
    assert rounded != losses
    torch.testing.assert_close(rounded, losses, rtol=2e-3, atol=0)


def step_loss(trainer, batches):
    """The loss of an optimizer step of these batches."""
    batches, items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    trainer.model.train()
    return sum(trainer.compute_loss(trainer.model, batch, num_items_in_batch=items) for batch in batches)


@pytest.mark.parametrize("fused_head", [False, True])
def test_which_rows_count(fused_head, tmp_path):
    """Labels already shifted, none at all, and rows without a label that are distilled."""
    teacher, model = llama(1, 24), llama(0)
    pair = groups(1)[0] + groups(1)[1]

    def ours(batches, **distillation):
        trainer = trainer_of(
            model, tmp_path, teacher=teacher, distillation=distillation, fused_head=fused_head
        )
        return step_loss(trainer, batches)

    def logits(batch, of):
        return of(batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    moved = [dict(b, shift_labels=F.pad(b["labels"], (0, 1), value=-100)[:, 1:]) for b in pair]
    torch.testing.assert_close(ours(moved, **OPTIONS), ours(pair, **OPTIONS), rtol=1e-12, atol=0)

    bare = [{name: b[name] for name in ("input_ids", "attention_mask")} for b in pair]
    present = [b["attention_mask"] == 1 for b in pair]
    number = sum(int(p.sum()) for p in present)
    sums = [
        rows_loss(logits(b, model)[p], logits(b, teacher)[p], None)
        for b, p in zip(pair, present, strict=True)
    ]
    torch.testing.assert_close(ours(bare), sum(sums) / number, rtol=1e-12, atol=0)
    without_mask = [{"input_ids": b["input_ids"][:1, :3]} for b in pair]
    sums = [rows_loss(*(m(**b).logits[0] for m in (model, teacher)), None) for b in without_mask]
    torch.testing.assert_close(ours(without_mask), sum(sums) / 6, rtol=1e-12, atol=0)

    # The KL of all tokens over their number, the label term of the labelled ones over theirs.
    labels = [F.pad(b["labels"], (0, 1), value=-100)[:, 1:] for b in pair]
    labelled = sum(int((y != -100).sum()) for y in labels)
    terms = [
        F.cross_entropy(logits(b, model).flatten(0, 1), y.flatten(), reduction="sum")
        for b, y in zip(pair, labels, strict=True)
    ]
    kl = sum(
        rows_loss(logits(b, model)[p], logits(b, teacher)[p], None)
        for b, p in zip(pair, present, strict=True)
    )
    expected = 0.3 * sum(terms) / labelled + 0.7 * kl / number
    torch.testing.assert_close(
        ours(pair, label_weight=0.3, ignored_rows="distill"), expected, rtol=1e-12, atol=0
    )


def test_rows_of_the_cache(cache, tmp_path):
    """Padding on either side, numbers by token, rows that are not read, and what is refused."""
    model, teacher = llama(0), llama(1, 24)
    trainer = trainer_of(model, tmp_path, teacher=cache, distillation=OPTIONS, row_column="teacher_row")
    data = sentences()[:2]
    right, left = collate(data), collate(data, side="left")
    by_token = dict(
        right,
        teacher_row=torch.where(right["attention_mask"] == 1, torch.arange(9) + torch.tensor([[0], [5]]), -1),
    )
    items = int((right["labels"] != -100).sum())
    for batch in (right, left, by_token):
        expected = batch_loss(model, teacher, batch, items, temperature=2.0, weight=0.3)
        torch.testing.assert_close(step_loss(trainer, [batch]), expected, rtol=1e-5, atol=0)
    for wrong, words in (
        ({name: right[name] for name in ("input_ids", "labels")}, "no column 'teacher_row'"),
        (dict(right, teacher_row=torch.zeros(3, dtype=torch.int64)), r"must be \[2, 9\] or \[2\], got \[3\]"),
        (dict(right, teacher_row=torch.zeros(2)), "must be integers"),
        (
            dict(by_token, teacher_row=by_token["teacher_row"] * 0 - 1),
            "no row of the cache for a row that counts",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            step_loss(trainer, [wrong])
    with pytest.raises(ValueError, match="the student has 44 columns, the cache is of 40"):
        step_loss(trainer_of(llama(0, columns=44), tmp_path, teacher=cache, distillation=OPTIONS), [right])
    # Predicted without labels, the column is no input of the model.
    assert (
        trainer.predict([{"input_ids": x["input_ids"], "teacher_row": 0} for x in data]).predictions.shape[0]
        == 2
    )
    wider = dict(OPTIONS, vocab_size=VOCABULARY)
    assert step_loss(
        trainer_of(llama(0, columns=44), tmp_path, teacher=cache, distillation=wider), [right]
    ).isfinite()


def test_classifiers(tmp_path):
    """No shift, one row per example, labelled or not; a teacher that takes what the student does not."""
    model = llama(0, kind=tf.LlamaForSequenceClassification, num_labels=3)
    torch.manual_seed(2)
    config = tf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    teacher = tf.BertForSequenceClassification(config).double()
    # Behind the columns that the Trainer removes.
    examples = [
        x | {"labels": i % 3, "token_type_ids": torch.arange(len(x["input_ids"])) % 2, "other": 1}
        for i, x in enumerate(sentences()[:4])
    ]

    def pad(examples):
        assert "other" not in examples[0]
        assert "token_type_ids" in examples[0]
        batch = collate(examples, labelled=False, index=False)
        kinds = [
            F.pad(x["token_type_ids"], (0, batch["input_ids"].shape[1] - len(x["input_ids"])))
            for x in examples
        ]
        labels = {"labels": torch.tensor([x["labels"] for x in examples])} if "labels" in examples[0] else {}
        return batch | labels | {"token_type_ids": torch.stack(kinds)}

    trainer = trainer_of(
        model, tmp_path, teacher=teacher, distillation=OPTIONS, collator=pad, label_smoothing_factor=0.1
    )
    trainer.train_dataset = examples
    given = []
    handle = model.register_forward_pre_hook(lambda *a: given.append(set(a[2])), with_kwargs=True)
    batches = list(trainer.get_train_dataloader())
    ours = step_loss(trainer, batches)
    handle.remove()
    assert given == [{"input_ids", "attention_mask"}] * 2
    kinds = ("input_ids", "attention_mask", "token_type_ids")
    teacher_logits = [teacher(**{name: b[name] for name in kinds}).logits for b in batches]
    student_logits = [model(**{name: b[name] for name in kinds[:2]}).logits for b in batches]
    labels = torch.cat([b["labels"] for b in batches])
    both = torch.cat(student_logits), torch.cat(teacher_logits)
    expected = rows_loss(*both, labels, temperature=2.0, weight=0.3, smoothing=0.1) / 4
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)

    bare = [{name: b[name] for name in kinds} for b in batches]
    unlabelled = [{name: t for name, t in x.items() if name != "labels"} for x in examples]
    trainer = trainer_of(model, tmp_path, teacher=teacher, eval_dataset=unlabelled, collator=pad)
    expected = rows_loss(*both, None) / 4
    torch.testing.assert_close(step_loss(trainer, bare), expected, rtol=1e-12, atol=0)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)
    predicted = torch.tensor(trainer.predict(unlabelled).predictions)
    torch.testing.assert_close(predicted, both[0].detach(), rtol=0, atol=1e-12)


def test_other_families(tmp_path):
    """A model without a loss_type whose loss shifts, masked tokens, an encoder with a decoder."""
    size = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
    torch.manual_seed(0)
    gpt2 = tf.GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    bert = tf.BertConfig(**size, intermediate_size=16, max_position_embeddings=16)
    t5 = tf.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    batch = collate(sentences()[:2], index=False)
    for kind, config, shift in (
        (tf.GPT2LMHeadModel, gpt2, True),
        (tf.BertForMaskedLM, bert, False),
        (tf.T5ForConditionalGeneration, t5, False),
    ):
        student, teacher = (kind(config).double().eval() for _ in range(2))
        for model in (student, teacher):
            if model.get_output_embeddings().bias is not None:
                nn.init.normal_(model.get_output_embeddings().bias)
        ours = {}
        for fused_head in (False, True):
            trainer = trainer_of(
                student, tmp_path, teacher=teacher, distillation=OPTIONS, fused_head=fused_head
            )
            _, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
            student.eval()  # no dropout
            ours[fused_head] = trainer.compute_loss(student, batch)
        labels = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:] if shift else batch["labels"]
        counted = labels != -100
        assert items.tolist() == [int(counted.sum())]
        inputs = {name: t for name, t in batch.items() if name != "labels"}
        if kind is tf.T5ForConditionalGeneration:
            inputs = batch  # makes the decoder's inputs of them
        logits = [m(**inputs).logits[counted] for m in (student, teacher)]
        expected = rows_loss(*logits, labels[counted], temperature=2.0, weight=0.3) / counted.sum()
        for fused_head, loss in ours.items():
            torch.testing.assert_close(
                loss, expected, rtol=1e-10, atol=0, msg=f"{kind.__name__} {fused_head}"
            )


@pytest.mark.parametrize("fused_head", [False, True])
def test_evaluation(fused_head, tmp_path):
    """The loss is the mean of batches' means, as the Trainer's; predictions are the student's logits."""
    model, teacher = llama(0), llama(1, 24)
    trainer = trainer_of(
        model,
        tmp_path,
        teacher=teacher,
        distillation=OPTIONS,
        fused_head=fused_head,
        eval_dataset=sentences()[:4],
    )
    means, logits = [], []
    for (batch,) in groups(1)[:2]:
        items = int((batch["labels"][:, 1:] != -100).sum())
        means.append(batch_loss(model, teacher, batch, items, temperature=2.0, weight=0.3).item())
        logits.append(model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(sum(means) / 2, rel=1e-6)
    predicted = trainer.predict(sentences()[:2])
    torch.testing.assert_close(torch.tensor(predicted.predictions), logits[0].detach(), rtol=0, atol=1e-12)
    assert predicted.metrics["test_loss"] == pytest.approx(means[0], rel=1e-6)
    assert not model.training
    given = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor([7.0]))
    assert given.item() == pytest.approx(means[1], rel=1e-6)  # of the batch, as evaluations are


def test_the_teacher_is_left_alone(tmp_path):
    """Eval mode, no graph, no cache of keys, no gradient, nowhere in the checkpoint."""
    model, teacher = llama(0), llama(1, 24, attention_dropout=0.5).train()
    before = weights(teacher)
    seen = []
    teacher.register_forward_pre_hook(
        lambda m, a, kw: seen.append((m.training, torch.is_grad_enabled(), kw["use_cache"])), with_kwargs=True
    )
    trainer = trainer_of(
        model,
        tmp_path,
        teacher=teacher,
        distillation=OPTIONS,
        save_strategy="steps",
        save_steps=2,
        max_steps=2,
    )
    trainer.train()
    assert set(seen) == {(False, False, False)}
    assert len(seen) == 2
    assert all(p.grad is None and p.requires_grad for p in teacher.parameters())
    assert_same(weights(teacher), before)
    saved = tf.LlamaForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2", dtype=torch.float64)
    assert_same(weights(saved), weights(model))


def test_logits_that_are_not_the_head_s(tmp_path):
    """Gemma's softcap has to be said, Granite's scale cannot be."""
    torch.manual_seed(0)
    size = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 16,
    }  # fmt: skip
    gemma = tf.Gemma2ForCausalLM(tf.Gemma2Config(**size, final_logit_softcapping=0.01)).double()
    batch = collate(sentences()[:2])
    trainer = trainer_of(gemma, tmp_path, teacher=llama(1), distillation=OPTIONS, fused_head=True)
    with pytest.raises(ValueError, match=r"the student's logits are not .* softcap=0.01"):
        step_loss(trainer, [batch])
    assert "forward" not in gemma.lm_head.__dict__
    assert gemma.training
    losses = [
        step_loss(
            trainer_of(gemma, tmp_path, teacher=llama(1), distillation=options, fused_head=fused_head),
            [batch],
        )
        for fused_head, options in ((False, OPTIONS), (True, OPTIONS | {"softcap": (0.01, None)}))
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    granite = tf.GraniteForCausalLM(
        tf.GraniteConfig(**{n: v for n, v in size.items() if n != "head_dim"}, logits_scaling=2.0)
    ).double()
    trainer = trainer_of(llama(0), tmp_path, teacher=granite, distillation=OPTIONS, fused_head=True)
    with pytest.raises(ValueError, match=r"the teacher's logits are not .*use fused_head=False"):
        step_loss(trainer, [batch])


def test_refused(cache, tmp_path):
    model, teacher = llama(0), llama(1, 24)
    for options, error, words in (
        ({"teacher": 3}, TypeError, "teacher must be a model or a TeacherCache"),
        ({"teacher": model}, ValueError, "teacher is the model that is trained"),
        ({"distillation": [1]}, TypeError, "distillation must be a dict"),
        ({"distillation": {"alpha": 1}}, ValueError, "'alpha' is not one of"),
        ({"distillation": {"reduction": "sum"}}, ValueError, "'reduction' is not one of"),
        ({"distillation": {"temperature": -1}}, ValueError, "temperature must be"),
        ({"distillation": {"chunk_rows": 8}}, ValueError, "'chunk_rows' is not one of"),
        ({"fused_head": 1}, TypeError, "fused_head must be True or False"),
        ({"teacher": cache, "fused_head": True}, ValueError, "this one is a TeacherCache"),
        ({"teacher": nn.Linear(2, 2), "fused_head": True}, ValueError, "get_output_embeddings"),
        ({"shift_labels": "yes"}, TypeError, "shift_labels must be True or False"),
        ({"row_column": 3}, TypeError, "row_column must be"),
        (
            {"distillation": {"label_smoothing": 0.2}, "label_smoothing_factor": 0.1},
            ValueError,
            "give one of them",
        ),
    ):
        with pytest.raises(error, match=words):
            trainer_of(model, tmp_path, **({"teacher": teacher} | options))
    with pytest.raises(ValueError, match="compute_loss_func"):
        DistillationTrainer(model, teacher=teacher, compute_loss_func=print)
    batch = collate(sentences()[:2])
    with pytest.raises(ValueError, match="labels were given without label_weight"):
        step_loss(trainer_of(model, tmp_path, teacher=teacher), [batch])
    wide = llama(1, columns=44)
    for fused_head in (False, True):
        with pytest.raises(ValueError, match="44"):
            step_loss(
                trainer_of(model, tmp_path, teacher=wide, distillation=OPTIONS, fused_head=fused_head),
                [batch],
            )
        cut = dict(OPTIONS, vocab_size=VOCABULARY)
        assert step_loss(
            trainer_of(model, tmp_path, teacher=wide, distillation=cut, fused_head=fused_head), [batch]
        ).isfinite()


class Plain(nn.Module):
    """No model of transformers."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY)

    def forward(self, input_ids):
        return (self.head(self.body(input_ids)),)


class Wrapped(nn.Module):
    """As PEFT's: its forward names nothing."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_base_model(self):
        return self.model

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


@pytest.mark.parametrize("fused_head", [False, True])
def test_a_wrapped_student(fused_head, tmp_path):
    batch, teacher, model = collate(sentences()[:2]), llama(1, 24), llama(0)
    losses = [
        step_loss(
            trainer_of(m, tmp_path, teacher=teacher, distillation=OPTIONS, fused_head=fused_head), [batch]
        )
        for m in (model, Wrapped(model))
    ]
    assert torch.equal(*losses)


def test_a_model_of_one_s_own(tmp_path):
    """It has to be said whether rows are shifted; outputs are a tuple."""
    torch.manual_seed(0)
    model, teacher = Plain().double(), Plain().double()
    with pytest.raises(ValueError, match=r"Plain does not say .* pass shift_labels"):
        trainer_of(model, tmp_path, teacher=teacher)
    batch = collate(sentences()[:2])
    trainer = trainer_of(model, tmp_path, teacher=teacher, distillation=OPTIONS, shift_labels=False)
    counted = batch["labels"] != -100
    logits = [m(batch["input_ids"])[0][counted] for m in (model, teacher)]
    expected = rows_loss(*logits, batch["labels"][counted], temperature=2.0, weight=0.3) / counted.sum()
    torch.testing.assert_close(step_loss(trainer, [batch]), expected, rtol=1e-12, atol=0)
    model.eval()
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs[0] is loss
    assert outputs[1].shape == (2, 9, VOCABULARY)
    with pytest.raises(ValueError, match="counted as 2 rows"):
        step_loss(trainer, [{"input_ids": batch["input_ids"]}])


def test_without_transformers():
    """The package does not import it; the integration says which extra has it."""
    program = """
import sys
import fasttransfer
assert "transformers" not in sys.modules
assert "accelerate" not in sys.modules
for library in ("transformers", "accelerate"):
    sys.modules[library] = None
    try:
        import fasttransfer.integrations.transformers
    except ImportError as error:
        assert f"needs {library}: pip install fasttransfer[transformers]" in str(error), error
    else:
        raise AssertionError(library)
    del sys.modules[library]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_mixin_in_a_trainer_of_one_s_own(tmp_path):
    class Mine(integration.DistillationMixin, Own):
        pass

    trainer = trainer_of(
        llama(0), tmp_path, kind=Mine, teacher=llama(1, 24), distillation=OPTIONS, max_steps=1
    )
    assert trainer.train().global_step == 1
