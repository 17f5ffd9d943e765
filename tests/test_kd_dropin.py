"""A training script that has only F.kl_div and F.cross_entropy changes by one call and gets the same training."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fasttransfer import KDLoss, kd_loss

T = 4.0
STEPS = 6


def plain_kl(s, t, _y):
    return F.kl_div(F.log_softmax(s / T, dim=1), F.softmax(t / T, dim=1), reduction="batchmean") * T * T


def plain_both(s, t, y):
    return 0.7 * plain_kl(s, t, y) + 0.3 * F.cross_entropy(s, y)


def plain_sequence(s, t, y):
    """Language models: logits [B, S, V], padding labelled -100; mean over the positions that are predicted."""
    s, t, y = s.flatten(0, 1), t.flatten(0, 1), y.flatten()
    keep = y != -100
    soft = F.kl_div(F.log_softmax(s[keep] / T, -1), F.softmax(t[keep] / T, -1), reduction="batchmean") * T * T
    return 0.7 * soft + 0.3 * F.cross_entropy(s, y, ignore_index=-100)


SCRIPTS = {
    "kl_div": (plain_kl, lambda s, t, y: kd_loss(s, t, temperature=T)),
    "kl_div, batchmean": (plain_kl, lambda s, t, y: kd_loss(s, t, temperature=T, reduction="batchmean")),
    "kl_div and cross_entropy": (
        plain_both,
        lambda s, t, y: kd_loss(s, t, y, temperature=T, label_weight=0.3),
    ),
    "a module": (plain_both, KDLoss(temperature=T, label_weight=0.3)),
    "cross_entropy": (
        lambda s, t, y: F.cross_entropy(s, y),
        lambda s, t, y: kd_loss(s, t, y, label_weight=1.0),
    ),
}


def train(loss_function, model, teacher, batches):
    """The script. Losses and gradients of every step, and the weights at the end."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses, grads = [], []
    for x, y in batches:
        with torch.no_grad():
            teacher_logits = teacher(x)
        loss = loss_function(model(x), teacher_logits, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        grads += [p.grad.clone() for p in model.parameters()]
    return torch.stack(losses), grads, [p.detach() for p in model.parameters()]


def assert_same_training(plain, ours, model, teacher, batches):
    losses, grads, weights = train(plain, model, teacher, batches)
    our_losses, our_grads, our_weights = train(ours, model, teacher, batches)
    assert losses[0] != losses[-1], "nothing was learned: the comparison says little"
    torch.testing.assert_close(our_losses, losses)
    for ours_, plain_ in zip(our_grads + our_weights, grads + weights, strict=True):
        torch.testing.assert_close(ours_, plain_, rtol=1e-4, atol=1e-6)


def mlp(inputs, classes):
    return torch.nn.Sequential(torch.nn.Linear(inputs, 32), torch.nn.ReLU(), torch.nn.Linear(32, classes))


@pytest.mark.parametrize("script", SCRIPTS)
def test_classifier(backend, script):
    plain, ours = SCRIPTS[script]
    batches = [(torch.randn(16, 8), torch.randint(10, (16,))) for _ in range(STEPS)]
    assert_same_training(plain, ours, mlp(8, 10), mlp(8, 10), batches)


def test_sequences_with_padding(backend):
    model, teacher = (torch.nn.Sequential(torch.nn.Embedding(50, 16), mlp(16, 50)) for _ in range(2))
    batches = []
    for _ in range(STEPS):
        tokens = torch.randint(50, (4, 9))
        labels = F.pad(tokens, (0, 1), value=-100)[:, 1:]
        labels[0, 3:] = -100
        batches.append((tokens, labels))

    def ours(s, t, y):
        return kd_loss(s, t, y, temperature=T, label_weight=0.3)

    assert_same_training(plain_sequence, ours, model, teacher, batches)


def test_gradient_accumulation_with_num_items(backend):
    """Micro-batches of different counts: dividing each by the count of all gives the gradient of the whole batch."""
    model, teacher = mlp(8, 10), mlp(8, 10)
    x, y = torch.randn(20, 8), torch.randint(10, (20,))
    y[:7] = -100
    with torch.no_grad():
        t = teacher(x)
    plain_sequence(model(x)[None], t[None], y[None]).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    items = (y != -100).sum()
    for part in (slice(0, 5), slice(5, 12), slice(12, 20)):
        kd_loss(model(x[part]), t[part], y[part], temperature=T, label_weight=0.3, num_items=items).backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)
