"""The language model's example, tiny: its arithmetic, and that it fails on a wrong gradient or a parted curve."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the example's models are transformers' Llamas")
pytest.importorskip("safetensors", reason="the teacher's cache is made of safetensors files")
pytest.importorskip("rich", reason="the examples print with rich")
pytest.importorskip("matplotlib", reason="the examples plot with matplotlib")

from examples import language_losses, language_model, readme
from examples.language_data import CONTEXT, byte_sequences, llama, texts
from examples.language_training import batches, bits_per_byte, next_token

TINY = {"seeds": 1, "teacher": 2, "student": 2, "trial": 1, "set": 16, "held_out": 2, "lockstep": 2, "pieces": 300,
        "piece_text": 20_000}  # fmt: skip


class Quiet:
    def say(self, what):
        pass

    def advance(self):
        pass


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(language_model.SIZES, "quick", TINY)
    monkeypatch.setattr(language_model, "over_seeds", lambda run, seeds, reporter: [run(s) for s in seeds])
    return lambda: language_model.run(True, Quiet())


def test_it_runs(tiny, tmp_path):
    outcome = tiny()
    assert outcome.failures == []
    assert set(outcome.results["students"]) == set(outcome.results["ms"]) | {language_model.SHUFFLED}
    assert (
        outcome.results["cache"]["32"]["bytes"]
        > outcome.results["cache"]["8"]["bytes"]
        > 16 * CONTEXT * 8 * 3
    )
    peak = {name: loss["peak"] for name, loss in outcome.results["lockstep"]["losses"].items()}
    assert max(peak[language_model.FUSED], peak[language_model.WHOLE]) < peak[language_model.NAIVE]
    assert language_model.plot_language_model(outcome.results, tmp_path).stat().st_size > 10_000


def lockstep():
    return {"students": {}, "lockstep": language_losses.lockstep(TINY, 0.5, Quiet())}


def test_it_fails_on_a_wrong_gradient_and_on_another_curve(monkeypatch):
    assert language_model.failures(lockstep(), True) == []
    right = language_losses.LOSSES[language_model.FUSED]
    monkeypatch.setitem(
        language_losses.LOSSES, language_model.FUSED, lambda s, t, x, weight: right(s, t, x, weight + 0.01)
    )
    words = language_model.failures(lockstep(), True)
    assert any("the gradient is off" in line for line in words)
    assert any("a loss is off" in line for line in words)


def test_labels_are_shifted_beside_whole_logits():
    x = byte_sequences("abc" * CONTEXT)[:2]
    labels = next_token(x)
    assert torch.equal(labels[:, :-1], x[:, 1:])
    assert (labels[:, -1] == -100).all()
    model = llama(32, 1, 256, 0)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    assert bits_per_byte(model, x) == pytest.approx(8)  # uniform over 256
    assert math.isclose(sum(len(text) for text in texts()) / 1e6, 4, rel_tol=0.9)


def test_batches_see_every_sequence_once_per_epoch():
    seen = torch.cat(list(batches(48, 6, 0)))
    assert seen[:48].sort().values.tolist() == seen[48:].sort().values.tolist() == list(range(48))
    assert seen[:48].tolist() != seen[48:].tolist()


def test_the_page_shows_the_committed_run():
    page = (Path(__file__).parent.parent / "docs/language_models.md").read_text()
    assert readme.language() in page
