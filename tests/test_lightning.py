"""Lightning's callbacks: a Trainer run beside the loop written by hand, weights after every batch."""

from __future__ import annotations

import copy
import logging
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pl = pytest.importorskip("lightning.pytorch", reason="the callbacks are for Lightning")

from fasttransfer import EMA, L2SP, freeze, thaw
from fasttransfer.integrations.lightning import EMACallback, L2SPCallback, StagedUnfreezing, base

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = [
    (torch.randn(8, 6, generator=torch.Generator().manual_seed(i)), torch.arange(8) % 3) for i in range(7)
]
ONE = torch.utils.data.DataLoader(BATCHES[:1], batch_size=None)
EPOCHS = 2
OPTIMIZERS = {
    "sgd": lambda groups, **options: torch.optim.SGD(groups, 0.1, momentum=0.9, weight_decay=0.01, **options),
    "adamw": lambda groups, **options: torch.optim.AdamW(groups, 0.05, weight_decay=0.01, **options),
}


class Model(pl.LightningModule):
    def __init__(self, optimizer="sgd", groups=None, schedule=False, **options):
        super().__init__()
        torch.manual_seed(0)
        # No bias before BatchNorm: its gradient is 0 but for roundings, which Adam blows up to steps.
        self.body = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5))
        self.head = nn.Linear(5, 3)
        self.optimizer, self.groups, self.schedule, self.options = optimizer, groups, schedule, options
        self.seen = []  # weights of validation

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, _):
        return F.cross_entropy(self(batch[0]).float(), batch[1])

    def validation_step(self, batch, _):
        self.seen.append(weights(self))

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        groups = self.parameters() if self.groups is None else self.groups(self)
        optimizer = OPTIMIZERS[self.optimizer](groups, **self.options)
        if not self.schedule:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


class Record(pl.Callback):
    """The weights after every batch, behind what all callbacks did."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights.append(weights(pl_module))


def weights(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def trainer_of(*callbacks, epochs=EPOCHS, **options):
    options = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0} | options
    return pl.Trainer(
        accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def fit(model, *callbacks, validation=None, ckpt_path=None, **options):
    record = Record()
    trainer = trainer_of(*callbacks, record, **options)
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    trainer.fit(model, loader, validation, ckpt_path=ckpt_path)
    return trainer, record.weights


def by_hand(
    model, *, accumulate=1, clip=None, before=None, after=None, at_epoch=None, scaler=None, epochs=EPOCHS
):
    """The loop that a callback stands for; ``before`` clipping and ``after`` the step; weights after every batch."""
    optimizer = model.configure_optimizers()
    seen = []
    for epoch in range(epochs):
        model.train()
        if at_epoch is not None:
            at_epoch(epoch)
        for i, batch in enumerate(BATCHES):
            if i % accumulate == 0:
                optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=scaler is not None, cache_enabled=False):
                loss = model.training_step(batch, i) / accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()
            if (i + 1) % accumulate == 0 or i + 1 == len(BATCHES):
                if scaler is not None:
                    scaler.unscale_(optimizer)
                finite = all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
                if before is not None:
                    before(optimizer)
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
                if after is not None and finite:
                    after(optimizer)
            seen.append(weights(model))
    return seen


def assert_same(ours, by_hand, tolerance=0.0):
    assert len(ours) == len(by_hand)
    for i, (mine, theirs) in enumerate(zip(ours, by_hand, strict=True)):
        assert mine.keys() == theirs.keys()
        for name, t in mine.items():
            close = torch.allclose(t, theirs[name], rtol=tolerance, atol=tolerance)
            assert close, f"batch {i}, {name}: {(t - theirs[name]).abs().max()}"


def pull(model, strength, by):
    """(before, after): the formula of the penalty's gradient, or of the proximal step."""
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def add(_):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.grad += 2 * strength * (p - start[name])

    @torch.no_grad()
    def prox(optimizer):
        for group in optimizer.param_groups:
            h = 2 * group["lr"] * strength
            names = {id(p): name for name, p in model.named_parameters()}
            for p in group["params"]:
                if p.requires_grad:
                    p.copy_((p + h * start[names[id(p)]]) / (1 + h))

    return (add, None) if by == "grad" else (None, prox)


# ------------------------------------------------------------------------------------------------------------ L2SP


@pytest.mark.parametrize(
    "optimizer, by", [("sgd", "grad"), ("adamw", "prox"), ("adamw", "grad"), ("sgd", "prox")]
)
@pytest.mark.parametrize("accumulate, clip", [(1, None), (3, 0.3)])
def test_l2sp_is_the_loop(optimizer, by, accumulate, clip):
    automatic = (optimizer, by) in [("sgd", "grad"), ("adamw", "prox")]
    callback = L2SPCallback(0.4, by="auto" if automatic else by)
    _, ours = fit(Model(optimizer), callback, accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    model = Model(optimizer)
    before, after = pull(model, 0.4, by)
    assert_same(ours, by_hand(model, accumulate=accumulate, clip=clip, before=before, after=after), 1e-6)
    without = by_hand(Model(optimizer), accumulate=accumulate, clip=clip)
    assert max((ours[-1][n] - without[-1][n]).abs().max() for n in ("head.weight", "body.0.weight")) > 1e-2


class OneInfinite(Model):
    """The gradient of its fifth batch overflows."""

    def training_step(self, batch, i):
        loss = super().training_step(batch, i)
        return loss * float("inf") if i == 4 else loss


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer, by", [("sgd", "grad"), ("adamw", "prox")])
def test_loss_scaling(optimizer, by, fused):
    """Unscaled gradients, or those that a fused optimizer unscales; nothing at all in a step that is skipped."""
    amp = pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    averaged = EMACallback(0.5)
    model = OneInfinite(optimizer, fused=fused)
    _, ours = fit(model, L2SPCallback(0.4), averaged, plugins=amp)
    model = OneInfinite(optimizer)
    before, after = pull(model, 0.4, by)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    hand = by_hand(model, before=before, after=after, scaler=scaler)
    # Fused arithmetic rounds otherwise, and what is then rounded to float16 in the forward pass moves by more.
    assert_same(ours, hand, 1e-6 if not fused else 2e-3)
    assert torch.equal(ours[4]["head.weight"], ours[3]["head.weight"])
    assert int(averaged.ema.n_averaged) == EPOCHS * (len(BATCHES) - 1)


def test_a_step_without_a_loss():
    class Skips(Model):
        def training_step(self, batch, i):
            return None if i == 2 else super().training_step(batch, i)

    averaged = EMACallback(0.5)
    for optimizer in OPTIMIZERS:
        _, ours = fit(Skips(optimizer), L2SPCallback(0.4), averaged)
        assert torch.equal(ours[2]["head.weight"], ours[1]["head.weight"])
        assert not torch.equal(ours[3]["head.weight"], ours[2]["head.weight"])
        assert int(averaged.ema.n_averaged) == EPOCHS * (len(BATCHES) - 1)


def test_l2sp_of_a_part():
    """Start points by the names of the submodule, a new head, what is logged, two optimizers in manual optimization."""

    class Two(Model):
        automatic_optimization = False

        def configure_optimizers(self):
            return torch.optim.SGD(self.body.parameters(), 0.1), torch.optim.AdamW(
                self.head.parameters(), 0.1
            )

        def training_step(self, batch, i):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, i))
                optimizer.step()

    pretrained = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).state_dict()
    callback = L2SPCallback({"0.*": 0.4, "*": 0.2}, module="body", start=pretrained, new_strength=0.1)
    trainer, ours = fit(Two(), callback, log_every_n_steps=1)
    assert callback.l2sp.new_names == ("3.weight", "3.bias")

    model = Two()
    body, head = model.configure_optimizers()
    reg = L2SP(model.body, {"0.*": 0.4, "*": 0.2}, start=pretrained, new_strength=0.1)
    hand = []
    for batch in BATCHES * EPOCHS:
        for optimizer in (body, head):
            optimizer.zero_grad()
            (Model.training_step(model, batch, 0) + (reg() if optimizer is body else 0)).backward()
            optimizer.step()
        hand.append(weights(model))
    assert_same(ours, hand, 1e-6)
    logged = trainer.callback_metrics
    assert logged["l2sp/penalty"].item() == pytest.approx(reg().item(), rel=1e-5)
    distance = sum(d.item() ** 2 for d in reg.distance().values()) ** 0.5
    assert logged["l2sp/distance"].item() == pytest.approx(distance, rel=1e-5)
    silent, _ = fit(Model(), L2SPCallback(0.4, log=False), log_every_n_steps=1)
    assert not silent.callback_metrics


def test_hooks_leave_the_optimizers():
    trainer, _ = fit(Model("adamw"), L2SPCallback(0.4), EMACallback())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks


# ------------------------------------------------------------------------------------------------------------- EMA


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ema_is_the_loop(accumulate):
    """And of the weights behind the prox; validation has the average, training its own weights."""
    averaged, model = EMACallback(0.7, warmup="ratio"), Model("adamw")
    callbacks = (averaged, L2SPCallback(0.4))  # whatever the order
    _, ours = fit(model, *callbacks, validation=ONE, accumulate_grad_batches=accumulate)

    hand = Model("adamw")
    _, prox = pull(hand, 0.4, "prox")
    average, at_validation = weights(hand), []
    steps = 0

    def after(optimizer):
        nonlocal steps
        prox(optimizer)
        decay = min(0.7, (1 + steps) / (10 + steps)) if steps else 0.0
        steps += 1
        for name, t in hand.state_dict().items():
            if name in dict(hand.named_parameters()):
                average[name] = decay * average[name] + (1 - decay) * t
            else:
                average[name] = t.clone()
        if steps % -(-len(BATCHES) // accumulate) == 0:
            at_validation.append(dict(average))

    assert_same(ours, by_hand(hand, accumulate=accumulate, after=after), 1e-6)
    assert_same(model.seen, at_validation, 1e-6)
    assert_same([averaged.ema.average()], at_validation[-1:], 1e-6)
    assert_same([weights(model)], ours[-1:])


def test_evaluation():
    """The average of a checkpoint or of the last fit; its own weights for another model, and after an exception."""
    averaged, model = EMACallback(0.5), Model()
    trainer, ours = fit(model, averaged)
    average = copy.deepcopy(averaged.ema.average())
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        model.seen.clear()
        evaluate(model, ONE)
        assert_same(model.seen, [average])
        assert_same([weights(model)], ours[-1:])
    other = Model()
    trainer.test(other, ONE, verbose=False)
    assert_same(other.seen, [weights(Model())])

    def stop(*_):
        raise RuntimeError("stop")

    model.test_step = stop
    with pytest.raises(RuntimeError, match="stop"):
        trainer.test(model, ONE)
    assert_same([weights(model)], ours[-1:])

    model = Model()
    fit(model, EMACallback(0.5, evaluate="model"), validation=ONE)
    assert_same(model.seen[-1:], [weights(model)])
    student = EMACallback(0.5, module="head")
    fit(Model(), student)
    assert list(student.ema.average()) == ["weight", "bias"]


# ------------------------------------------------------------------------------------------------------- unfreezing
STAGES = {"head": 0, "body.3": 1, "body": 2}
RATES = {"head": 0.1, "body.3": 0.05, "body": 0.02}


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_moves_in_which_epoch(optimizer):
    unfreezing = StagedUnfreezing(STAGES)
    model = Model(optimizer, lambda m: unfreezing.param_groups(m, RATES), schedule=True)
    start = weights(model)
    trainer, ours = fit(model, unfreezing, epochs=4)
    n = len(BATCHES)
    head, last = {"head.weight", "head.bias"}, {"body.3.weight", "body.3.bias"}
    everything = set(start)  # the statistics of BatchNorm among them
    for epoch, expected in enumerate([head, head | last, everything, everything]):
        assert moved(ours[epoch * n - 1] if epoch else start, ours[(epoch + 1) * n - 1]) == expected
    groups = trainer.optimizers[0].param_groups
    assert [(g["name"], g["initial_lr"]) for g in groups] == list(RATES.items())
    assert [g["lr"] for g in groups] == pytest.approx([rate * 0.8**4 for rate in RATES.values()])


def test_unfreezing_is_the_loop():
    unfreezing = StagedUnfreezing(STAGES)
    model = Model("adamw", lambda m: unfreezing.param_groups(m, RATES))
    _, ours = fit(model, unfreezing, L2SPCallback(0.4), epochs=3, gradient_clip_val=0.3)
    parts = {"head": lambda m: m.head, "body.3": lambda m: m.body[3], "body": lambda m: m.body[:3]}
    hand = Model("adamw", lambda m: [{"params": parts[n](m).parameters(), "lr": RATES[n]} for n in RATES])
    _, after = pull(hand, 0.4, "prox")

    def at_epoch(epoch):
        freeze(hand)
        thaw(hand, [name for name, begin in STAGES.items() if begin <= epoch])

    assert_same(ours, by_hand(hand, clip=0.3, after=after, at_epoch=at_epoch, epochs=3), 1e-6)


def test_the_first_pattern_counts():
    model = Model()
    start = weights(model)
    _, ours = fit(model, StagedUnfreezing({"body.3": 1, "*": 0}))
    last = {"body.3.weight", "body.3.bias"}
    assert moved(start, ours[len(BATCHES) - 1]) == set(start) - last
    assert moved(start, ours[-1]) == set(start)


def test_steps():
    """Counted in optimizer steps, and in a part: what is outside of it is left as it is."""
    model = Model()
    start = weights(model)
    unfreezing = StagedUnfreezing({"3": 0, "*": 2}, unit="step", module="body")
    _, ours = fit(model, unfreezing, accumulate_grad_batches=2)
    assert "body.0.weight" not in moved(start, ours[3])
    assert moved(start, ours[3]) >= {"body.3.weight", "head.weight"}
    assert moved(start, ours[4]) >= {"body.1.running_mean"}
    assert moved(start, ours[5]) >= {"body.0.weight"}


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_is_uninterrupted(optimizer, tmp_path):
    def run(epochs, ckpt_path=None, start=None):
        unfreezing = StagedUnfreezing(STAGES)
        callbacks = unfreezing, L2SPCallback(0.4, start=start), EMACallback(0.7, warmup="ratio")
        model = Model(optimizer, lambda m: unfreezing.param_groups(m, RATES), schedule=True)
        trainer, seen = fit(model, *callbacks, epochs=epochs, accumulate_grad_batches=3, ckpt_path=ckpt_path)
        return trainer, seen, callbacks[2].ema.average()

    _, whole, average = run(4)
    first, begun, _ = run(2)
    first.save_checkpoint(tmp_path / "x.ckpt")
    _, rest, resumed_average = run(4, tmp_path / "x.ckpt")
    assert_same(begun + rest, whole)
    assert_same([resumed_average], [average])

    kept = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]
    assert kept["L2SPCallback"]["l2sp"].keys() == L2SP(Model(), 0.4).state_dict().keys()
    plain = EMA(Model())
    plain.load_state_dict(kept["EMACallback"]["ema"])
    model = Model()
    trainer_of(EMACallback()).test(model, ONE, ckpt_path=tmp_path / "x.ckpt", verbose=False)
    assert_same(model.seen, [plain.average()])


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: L2SPCallback(-1), ValueError, "strength must be at least 0"),
        (lambda: L2SPCallback(1, new_strength="a"), TypeError, "new_strength must be a number"),
        (lambda: L2SPCallback(1, by="step"), ValueError, "by must be one of 'auto', 'grad', 'prox'"),
        (lambda: L2SPCallback(1, log=1), TypeError, "log must be True or False"),
        (lambda: L2SPCallback(1, module=nn.Linear(1, 1)), TypeError, "module must be the dotted name"),
        (lambda: EMACallback(2), ValueError, "decay must be between 0 and 1"),
        (lambda: EMACallback(warmup="slow"), ValueError, "warmup must be one of"),
        (lambda: EMACallback(evaluate="best"), ValueError, "evaluate must be one of 'average', 'model'"),
        (lambda: StagedUnfreezing(["head"]), TypeError, "stages must be a dict"),
        (lambda: StagedUnfreezing({"head": 0.5}), TypeError, r"stages\['head'\] must be an integer"),
        (lambda: StagedUnfreezing({"head": 1}), ValueError, "must begin at 0"),
        (lambda: StagedUnfreezing({"head": 0}, unit="batch"), ValueError, "unit must be one of"),
        (lambda: StagedUnfreezing(STAGES).param_groups(Model(), {"head": 1}), ValueError, "lr must have the patterns"),
        (lambda: StagedUnfreezing(STAGES).param_groups(Model(), -1.0), ValueError, r"lr\['head'\] must be at least 0"),
    ],
)  # fmt: skip
def test_bad_arguments(make, error, words):
    with pytest.raises(error, match=words):
        make()


HEAD_ONLY = {"groups": lambda model: model.head.parameters()}


@pytest.mark.parametrize(
    "callback, model, words",
    [
        (L2SPCallback(1, module="neck"), {}, "model has no module 'neck'"),
        (L2SPCallback(1, include="neck.*"), {}, "include: 'neck.*' matches none"),
        (L2SPCallback(1, module="body"), HEAD_ONLY, "none of the trainer's optimizers"),
        (EMACallback(module="body"), HEAD_ONLY, "none of the trainer's optimizers"),
        (StagedUnfreezing({"neck": 0}), {}, "stages: 'neck' matches none"),
        (StagedUnfreezing({"head": 0, "head.*": 1}), {}, "belongs to the patterns before it"),
        (
            StagedUnfreezing({"head": 0, "body": 1}),
            HEAD_ONLY,
            "'body.0.weight' of the stage 'body' is in none",
        ),
    ],
    ids=["module", "include", "l2sp", "ema", "stage", "covered", "optimizer"],
)
def test_refused_when_fit_starts(callback, model, words):
    model = Model(**model)
    with pytest.raises(ValueError, match=words):
        fit(model, callback)
    assert all(p.requires_grad for p in model.parameters())
    assert_same([weights(model)], [weights(Model())])


def test_refused_optimizer_and_strategy():
    class Lbfgs(Model):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ValueError, match="LBFGS compares losses"):
        fit(Lbfgs(), L2SPCallback(1))
    for strategy, words in (
        (pl.strategies.FSDPStrategy, "flat shards"),
        (pl.strategies.DDPStrategy, "unused_param"),
    ):
        trainer = trainer_of()
        trainer._accelerator_connector.strategy = strategy()
        with pytest.raises(ValueError, match=words):
            StagedUnfreezing(STAGES).on_fit_start(trainer, Model())


def test_either_name_of_lightning(monkeypatch):
    assert issubclass(L2SPCallback, pl.Callback)
    monkeypatch.setattr(base, "sys", type("sys", (), {"modules": {"pytorch_lightning": None}}))
    assert base._lightning().__name__ == "pytorch_lightning"


def test_without_lightning(monkeypatch):
    for name in [n for n in sys.modules if n.startswith("fasttransfer.integrations.lightning")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install fasttransfer\[lightning\]"):
        import fasttransfer.integrations.lightning  # noqa: F401
