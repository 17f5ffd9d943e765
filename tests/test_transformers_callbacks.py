"""Callbacks of transformers' Trainer: beside the loop written by hand, and resumed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fasttransfer import EMA, L2SP
from tests.trainer_runs import (
    OPTIONS,
    Own,
    assert_same,
    by_hand,
    collate,
    integration,
    llama,
    losses_of,
    sentences,
    tf,
    trainer_of,
    weights,
)

EMACallback, L2SPCallback = integration.EMACallback, integration.L2SPCallback
pytestmark = pytest.mark.filterwarnings("ignore")


def own_loss(model, batch, items):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum") / items


def pull(model, strength, by):
    """(before, after) the step: the formula of the penalty's gradient, or of the proximal step."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def add():
        for name, p in model.named_parameters():
            p.grad += 2 * strength * (p - start[name])

    @torch.no_grad()
    def prox(optimizer):
        h = 2 * optimizer.param_groups[0]["lr"] * strength
        for name, p in model.named_parameters():
            p.copy_((p + h * start[name]) / (1 + h))

    return (add, None) if by == "grad" else (None, prox)


@pytest.mark.parametrize("optimizer, by", [("sgd", "grad"), ("adamw", "prox")])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_l2sp_is_the_loop(optimizer, by, accumulate, tmp_path):
    """Once per step, behind clipping; what is logged is of the weights behind the step."""
    callback, model = L2SPCallback(2.0), llama(0)
    trainer = trainer_of(
        model, tmp_path, callback, optimizer=optimizer, kind=Own, gradient_accumulation_steps=accumulate,
        collator=lambda examples: collate(examples, index=False),
    )  # fmt: skip
    trainer.train()
    hand = llama(0)
    before, after = pull(hand, 2.0, by)
    reg = L2SP(hand, 2.0)
    # Its own loss is in float32.
    by_hand(hand, own_loss, optimizer, accumulate, before, after)
    assert_same(weights(model), weights(hand), 1e-5)
    without = llama(0)
    by_hand(without, own_loss, optimizer, accumulate)
    assert (without.lm_head.weight - hand.lm_head.weight).abs().max() > 1e-3
    logged = [log for log in trainer.state.log_history if "l2sp/penalty" in log][-1]
    assert logged["l2sp/penalty"] == pytest.approx(reg().item(), rel=1e-3)
    assert logged["l2sp/distance"] == pytest.approx((reg().item() / 2.0) ** 0.5, rel=1e-3)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


def test_ema_is_the_loop(tmp_path):
    """Behind the prox; two evaluations per epoch and predictions by callbacks have the average, checkpoints do not."""
    model, hand = llama(0), llama(0)
    _, prox = pull(hand, 0.4, "prox")
    average, averages, trained = weights(hand), [], []

    def after(optimizer):
        prox(optimizer)
        decay = 0.7 if trained else 0.0
        for name, t in hand.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * t
        trained.append(weights(hand))
        averages.append(dict(average))

    by_hand(hand, own_loss, "adamw", 2, None, after)
    evaluated = []

    class Look(tf.TrainerCallback):
        """What an evaluation computes with, and a callback that looks at the model wherever it can."""

        def on_step_end(self, args, state, control, model, **_):
            model.eval()
            with torch.no_grad():
                model(torch.ones(1, 2, dtype=torch.int64))

        on_evaluate = on_save = on_step_end

        def on_prediction_step(self, args, state, control, model, **_):
            evaluated.append((state.global_step, model.lm_head.weight.detach().clone()))

    callback = EMACallback(0.7)
    trainer = trainer_of(
        model, tmp_path, callback, L2SPCallback(0.4), Look(), optimizer="adamw", kind=Own,
        gradient_accumulation_steps=2, collator=lambda examples: collate(examples, index=False), save_strategy="steps",
        save_steps=1, eval_strategy="steps", eval_steps=1, eval_dataset={"a": sentences()[:2], "b": sentences()[2:4]},
        save_only_model=True, load_best_model_at_end=True, metric_for_best_model="eval_a_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert [step for step, _ in evaluated] == [1, 1, 2, 2, 3, 3, 4, 4]
    for step, weight in evaluated:
        torch.testing.assert_close(weight, averages[step - 1]["lm_head.weight"], rtol=0, atol=1e-4)
    gap = (averages[3]["lm_head.weight"] - trained[3]["lm_head.weight"]).abs().max()
    assert gap > 1e-3
    assert_same(callback.ema.average(), averages[3], 1e-4)
    assert trainer.state.best_global_step == 1  # the worst; the last could not be told from no loading
    assert_same(weights(model), trained[0], 1e-4)
    for step in (1, 4):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        saved = tf.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
        assert_same(weights(saved), trained[step - 1], 1e-4)
        assert not (folder / "l2sp.pt").exists()
    other = EMA(llama(3))
    other.load_state_dict(torch.load(folder / "ema.pt", weights_only=True))
    assert_same(other.average(), callback.ema.average())
    # After training the model as it is.
    before = weights(model)
    model.eval()(torch.ones(1, 2, dtype=torch.int64))
    assert_same(weights(model), before)


def test_resumed(tmp_path):
    """From the middle of an epoch, with everything: the same run to the last bit."""

    def run(**options):
        model = llama(0)
        callbacks = L2SPCallback(0.4), EMACallback(0.7, warmup="ratio")
        trainer = trainer_of(
            model, tmp_path, *callbacks, optimizer="adamw", teacher=llama(1, 24), distillation=OPTIONS,
            gradient_accumulation_steps=2, save_strategy="steps", save_steps=1,
        )  # fmt: skip
        trainer.train(**options)
        return losses_of(trainer), weights(model), callbacks

    losses, whole, (_, averaged) = run()
    first = tmp_path / "run" / "checkpoint-1"
    resumed, again, (reg, average) = run(resume_from_checkpoint=str(first))
    assert resumed == losses
    assert_same(again, whole)
    assert_same(average.ema.average(), averaged.ema.average())
    assert_same(reg.l2sp.start.tensors(), dict(llama(0).named_parameters()))

    elsewhere = tmp_path / "elsewhere"
    first.rename(elsewhere)
    for callback in (L2SPCallback(0.4), EMACallback(0.7)):
        with pytest.raises(ValueError, match="as resume_from"):
            trainer_of(llama(0), tmp_path, callback, kind=Own).train(resume_from_checkpoint=str(elsewhere))
    callback = L2SPCallback(0.4, resume_from=elsewhere)
    trainer = trainer_of(llama(0), tmp_path, callback, optimizer="adamw", kind=Own, max_steps=2)
    trainer.train(resume_from_checkpoint=str(elsewhere))
    assert_same(callback.l2sp.start.tensors(), dict(llama(0).named_parameters()))


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: L2SPCallback(-1), ValueError, "strength must be at least 0"),
        (lambda: L2SPCallback(1, new_strength="a"), TypeError, "new_strength must be a number"),
        (lambda: L2SPCallback(1, by="step"), ValueError, "by must be one of 'auto', 'grad', 'prox'"),
        (lambda: L2SPCallback(1, log=1), TypeError, "log must be True or False"),
        (lambda: L2SPCallback(1, resume_from=3), TypeError, "resume_from must be a path"),
        (lambda: EMACallback(2), ValueError, "decay must be between 0 and 1"),
        (lambda: EMACallback(evaluate="best"), ValueError, "evaluate must be one of 'average', 'model'"),
        (lambda: EMACallback(resume_from=3), TypeError, "resume_from must be a path"),
    ],
)
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_refused_when_training_starts(tmp_path):
    model = llama(0)
    with pytest.raises(ValueError, match=r"include: 'neck.*' matches none"):
        trainer_of(model, tmp_path, L2SPCallback(1, include="neck.*"), kind=Own).train()
    for callback in (L2SPCallback(1), EMACallback()):
        args = copy.copy(trainer_of(model, tmp_path, kind=Own).args)
        args.fsdp = True
        with pytest.raises(ValueError, match="fsdp=True"):
            callback.on_train_begin(args, tf.TrainerState(), None, model=model, optimizer=None)


def test_a_step_that_the_scaler_skips(tmp_path):
    """There is no float16 training on the CPU: as the event comes then."""
    model, callback = llama(0), EMACallback(0.5)
    trainer = trainer_of(model, tmp_path, callback, kind=Own, max_steps=1)
    trainer.train()
    for skipped, updates in ((True, 1), (False, 2)):
        optimizer = type("Optimizer", (), {"step_was_skipped": skipped})()
        callback.on_optimizer_step(trainer.args, trainer.state, None, model=model, optimizer=optimizer)
        assert int(callback.ema.n_averaged) == updates
