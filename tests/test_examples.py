"""The examples: their data, their arithmetic over seeds, and that they fail without what they are about."""

import importlib
import math
from itertools import islice
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the examples' data is scikit-learn's")
pytest.importorskip("rich", reason="the examples print with rich")
pytest.importorskip("matplotlib", reason="some examples plot with matplotlib")

from rich.console import Console

from examples import (
    digits,
    readme,
    s1_fine_tuning,
    s2_feature_extraction,
    s3_distillation,
    s4_l2sp,
    s5_model_mapping,
    s6_fusion,
    s7_adaptive,
    s8_cross_domain,
    s9_choosing_a_source,
)
from examples.digits import Split, all_digits, few_labels, in_target_domain, split
from examples.s5_model_mapping import narrow_cnn
from examples.seeds import mean_and_spread, paired, points, summary, verdict
from examples.tables import against_controls, comparison
from examples.training import new_cnn, pretrained_cnn
from fasttransfer import logme

EXAMPLES = sorted(path.stem for path in Path(s5_model_mapping.__file__).parent.glob("s[0-9]_*.py"))


def numbered(labels):
    """A split whose images say where they come from: image i is all i."""
    images = torch.arange(len(labels), dtype=torch.float32)[:, None, None, None].expand(-1, 1, 8, 8)
    return Split(images, torch.tensor(labels))


def positions(data):
    return data.images[:, 0, 0, 0].long()


# ------------------------------------------------------------------------------------------------------- the data


def test_split_is_a_partition():
    parts = split(3)
    assert [len(part.labels) for part in parts] == [900, 400, 497]
    everything = torch.cat([torch.cat([part.images.flatten(1), part.labels[:, None]], 1) for part in parts])
    whole = torch.cat([all_digits().images.flatten(1), all_digits().labels[:, None]], 1)
    assert sorted(everything.tolist()) == sorted(whole.tolist())


def test_split_depends_on_the_seed_alone():
    first, again, other = split(0), split(0), split(1)
    assert torch.equal(first.test.images, again.test.images)
    assert not torch.equal(first.test.images, other.test.images)


def test_split_selects():
    data = numbered([3, 7, 3, 1, 9])
    assert data[1:3].labels.tolist() == [7, 3]
    assert positions(data[torch.tensor([4, 0])]).tolist() == [4, 0]
    assert positions(data[data.labels == 3]).tolist() == [0, 2]
    assert positions(data.only(3, 9)).tolist() == [0, 2, 4]
    assert positions(data.without(3)).tolist() == [1, 3, 4]
    assert data.without(3).labels.tolist() == [7, 1, 9]


@pytest.mark.parametrize("wrong", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("classes", [range(10), range(5, 10), (2, 7)])
def test_few_labels(classes, wrong):
    data = numbered([digit for digit in classes for _ in range(12)][::-1])
    few = few_labels(data, 6, seed=4, wrong=wrong)
    true = data.labels[positions(few)]
    assert len(positions(few).unique()) == 6 * len(classes)
    assert all((true == digit).sum() == 6 for digit in classes)
    # Each of the wrong ones is wrong, and every label is one that occurs.
    assert (few.labels != true).sum() == round(wrong * 6 * len(classes))
    assert set(few.labels.tolist()) <= set(classes)


def test_wrong_labels_reach_every_other_class():
    few = few_labels(numbered([5, 6, 7, 8, 9] * 200), 200, seed=0, wrong=1.0)
    true = torch.tensor([5, 6, 7, 8, 9] * 200)[positions(few)]
    pairs = set(zip(true.tolist(), few.labels.tolist(), strict=True))
    assert pairs == {(a, b) for a in range(5, 10) for b in range(5, 10) if a != b}


def test_few_labels_depends_on_the_seed_alone():
    data = split(0).pool
    first, again, other = (few_labels(data, 5, seed, wrong=0.3) for seed in (1, 1, 2))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    # The share of wrong labels changes labels, not which images there are.
    assert torch.equal(few_labels(data, 5, 1).images, first.images)


def test_few_labels_leaves_its_data_alone():
    data = split(0).pool
    before = data.labels.clone()
    few_labels(data, 5, 0, wrong=1.0)
    assert torch.equal(data.labels, before)


def test_target_domain():
    data = split(0).test
    images = data.images.clone()
    there, again, other = (in_target_domain(data, seed) for seed in (1, 1, 2))
    assert there.images.shape == data.images.shape
    assert there.images.min() >= 0
    assert there.images.max() <= 1
    assert torch.equal(there.labels, data.labels)
    assert torch.equal(there.images, again.images)
    assert not torch.equal(there.images, other.images)
    assert torch.equal(data.images, images)


def test_target_domain_is_turned_by_15_degrees(monkeypatch):
    monkeypatch.setattr(digits, "NOISE", 0.0)
    image = torch.zeros(1, 1, 8, 8)
    image[..., 3:5, 6] = 1.0  # right of the centre, at its height
    turned = in_target_domain(Split(image, torch.tensor([0])), 0).images[0, 0]
    place = torch.arange(8.0) - 3.5
    down, right = (turned.sum(1) * place).sum(), (turned.sum(0) * place).sum()
    assert abs(math.degrees(math.atan2(down, right))) == pytest.approx(15, abs=1.5)


def test_target_domain_is_noisy():
    grey = Split(torch.full((500, 1, 8, 8), 0.5), torch.zeros(500, dtype=torch.int64))
    inside = in_target_domain(grey, 0).images[..., 3:5, 3:5]  # not cut off by a corner of the turned image
    # Cut to [0, 1], that is at two standard deviations, where the variance of a normal distribution is 0.92.
    assert inside.std().item() == pytest.approx(0.25 * 0.92**0.5, rel=0.03)


# ------------------------------------------------------------------------------------------------ sums over seeds


def test_mean_and_spread():
    assert mean_and_spread([1.0, 3.0]) == {"mean": 2.0, "std": 2.0**0.5, "values": [1.0, 3.0]}
    assert mean_and_spread([0.25]) == {"mean": 0.25, "std": 0.0, "values": [0.25]}


def test_paired():
    # Differences 0.5, 0, -0.25, 0.75: mean 0.25; squares of the deviations 1/16 + 1/16 + 4/16 + 4/16, over 3.
    found = paired([1.0, 0.5, 0.25, 1.0], [0.5, 0.5, 0.5, 0.25])
    assert found == {
        "difference": 0.25, "std": pytest.approx((10 / 16 / 3) ** 0.5), "wins": 2, "ties": 1, "of": 4
    }  # fmt: skip
    assert paired([0.5], [0.25]) == {"difference": 0.25, "std": 0.0, "wins": 1, "ties": 0, "of": 1}


def test_paired_wants_the_same_seeds():
    with pytest.raises(ValueError):
        paired([0.5, 0.5], [0.5])


@pytest.mark.parametrize(
    "wins, ties, of, word",
    [
        (8, 0, 8, "helps"), (7, 0, 8, "helps"), (7, 1, 8, "helps"), (6, 0, 8, "unclear"), (6, 2, 8, "unclear"),
        (0, 0, 8, "hurts"), (1, 0, 8, "hurts"), (0, 1, 8, "hurts"), (2, 0, 8, "unclear"), (0, 2, 8, "unclear"),
        (0, 8, 8, "no change"), (4, 0, 8, "unclear"), (1, 7, 8, "unclear"),
        (7, 0, 7, "helps"), (6, 0, 7, "unclear"), (0, 0, 7, "hurts"),
        (2, 0, 2, "few seeds"), (0, 0, 2, "few seeds"), (0, 2, 2, "no change"),
    ],
)  # fmt: skip
def test_verdict(wins, ties, of, word):
    assert verdict({"wins": wins, "ties": ties, "of": of}) == word


BY_SEED = [
    {"base": {"target": 0.5}, "ours": {"target": 0.75, "alpha": 0.25}},
    {"base": {"target": 0.5}, "ours": {"target": 0.5, "alpha": 0.75}},
]


def test_summary():
    found = summary(BY_SEED, "target", ["base"])
    assert list(found) == ["base", "ours"]
    assert found["base"] == {"target": {"mean": 0.5, "std": 0.0, "values": [0.5, 0.5]}, "against": {}}
    assert found["ours"]["alpha"]["values"] == [0.25, 0.75]
    assert found["ours"]["target"]["mean"] == 0.625
    assert found["ours"]["against"] == {
        "base": {"difference": 0.125, "std": pytest.approx(0.125 * 2**0.5), "wins": 1, "ties": 1, "of": 2}
    }
    assert points(found, "ours", "base") == "+12.5 points, 1 of 2 seeds"


# ------------------------------------------------------------------------------------------------------ the tables


def rendered(table):
    console = Console(width=100, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_comparison_fits_its_width():
    names = ["source as it is", "fine-tuned", "blend with the start, alpha by CV", "weight decay by CV"]
    scores = [0.25, 1.0, 0.0, 0.75]
    by_seed = [
        {
            name: {"target": score, "source": 1 - score}
            for name, score in zip(names, scores[i:] + scores[:i], strict=True)
        }
        for i in range(4)
    ]
    methods = summary(by_seed, "target", names[:2])
    title = "5 labels per class, 30% wrong: test accuracy in %, mean ± std over 8 seeds"
    text = rendered(
        comparison(
            title,
            methods,
            {"target": "target", "source": "source"},
            {names[0]: "vs source", names[1]: "vs fine-tune"},
            notes={names[3]: "[dim]control[/]"},
        )
    )
    assert "…" not in text
    assert title in text
    assert all(name in text for name in names)
    assert "50.0 ± 45.6" in text
    assert all(word in text for word in ("baseline", "control", "few seeds"))


def test_comparison_of_a_method_without_a_figure():
    text = rendered(
        comparison("t", summary(BY_SEED, "target", ["base"]), {"target": "t", "alpha": "a"}, {"base": "vs"})
    )
    (base,) = (line.split() for line in text.splitlines() if line.split()[:1] == ["base"])
    assert base == ["base", "50.0", "±", "0.0", "–", "baseline"]
    assert "+12.5 1/2" in text


def test_against_controls():
    name, control = s8_cross_domain.FISHER, s8_cross_domain.SHUFFLED
    by_seed = [{name: {"target": 1.0}, control: {"target": 0.5 + seed / 100}} for seed in range(8)]
    text = rendered(against_controls("t", summary(by_seed, "target", [control]), [(name, control)]))
    assert "…" not in text
    (line,) = (line for line in text.splitlines() if name in line)
    assert line.split()[-9:] == ["100.0", "±", "0.0", "53.5", "±", "2.4", "+46.5", "8/8", "helps"]


def test_shuffled_importance_keeps_its_values():
    importance = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5.0)}
    found = s8_cross_domain.shuffled(importance, 1)
    for key, value in importance.items():
        assert found[key].shape == value.shape
        assert not torch.equal(found[key], value)
        assert torch.equal(found[key].flatten().sort().values, value.flatten())


def test_averaged_is_the_average_of_the_weights():
    model, data = new_cnn(0), split(0).pool[:20]
    found = next(islice(s4_l2sp.averaged(model, data, 0.5), 2, None))
    again = new_cnn(0)
    optimizer, average = s4_l2sp.adamw(again), {}
    for _ in range(30):
        s4_l2sp.step(again, data, optimizer)
        average = {
            key: 0.5 * average.get(key, p) + 0.5 * p.detach().double() for key, p in again.named_parameters()
        }
    for key, p in found.named_parameters():
        torch.testing.assert_close(p.double(), average[key].double(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_is_a_part(name):
    part = importlib.import_module(f"examples.{name}").PART
    assert 0 < part.units(True) < part.units(False)
    assert callable(part.run)
    assert part.about.startswith(name[:2].upper() + ", ")
    assert f"python -m examples.{name}" in part.about


def test_examples_have_keys_of_their_own():
    keys = [importlib.import_module(f"examples.{name}").PART.key for name in EXAMPLES]
    assert len(set(keys)) == len(keys)


@pytest.fixture
def one_seed(monkeypatch):
    """What an example finds for seed 0, in this process, where patches of its names reach it."""

    def run(module, **patches):
        monkeypatch.setattr(module, "over_seeds", lambda run_seed, chosen, reporter: [run_seed(0)])
        for name, value in patches.items():
            monkeypatch.setattr(module, name, value)
        return module.PART.run(True, None)

    return run


@pytest.mark.parametrize("module", [s5_model_mapping, s7_adaptive])
def test_example_passes(one_seed, module):
    outcome = one_seed(module)
    assert outcome.failures == []
    for table in outcome.tables:
        assert "…" not in rendered(table)


def test_mapping_fails_with_a_random_map(one_seed):
    failures = one_seed(s5_model_mapping, fitted_map=s5_model_mapping.random_map).failures
    assert any(s5_model_mapping.RANDOM in line for line in failures)


def test_mapping_fails_from_a_source_that_learns_nothing(one_seed):
    outcome = one_seed(
        s5_model_mapping,
        train=lambda model, data, **options: model,
        narrow_cnn=lambda seed: narrow_cnn(0),  # the untrained control is the source itself
    )
    assert any(s5_model_mapping.UNTRAINED in line for line in outcome.failures)


def test_adapting_fails_if_alpha_is_not_learned(one_seed):
    failures = one_seed(s7_adaptive, STEPS=0).failures
    assert sum("does not adjust" in line for line in failures) == 2


def test_adapting_fails_if_nothing_is_blended(one_seed):
    failures = one_seed(s7_adaptive, STEPS=1, blend_=lambda target, source, alpha: target).failures
    assert any(s7_adaptive.TUNED in line for line in failures)


def test_adapting_fails_if_the_other_network_is_the_same(one_seed):
    failures = one_seed(
        s7_adaptive, STEPS=1, pretrained_cnn=lambda data, seed: pretrained_cnn(data, 0)
    ).failures
    assert len(failures) == 3


def untrained(source, seed):
    return new_cnn(300 + seed)


def test_fine_tuning_fails_without_a_pretrained_backbone(one_seed):
    assert one_seed(s1_fine_tuning, pretrained_cnn=untrained).failures


def test_feature_extraction_fails_without_a_pretrained_network(one_seed):
    assert one_seed(s2_feature_extraction, pretrained_cnn=untrained).failures


def test_distillation_fails_on_labels(one_seed):
    def labels(transfer, teacher_logits, temperature):
        return s3_distillation.learn_labels(transfer)

    assert len(one_seed(s3_distillation, distil=labels, STEPS=50).failures) == 2


def test_l2sp_fails_without_the_pull(one_seed):
    class NoPull:
        def __init__(self, model, strength, start=None, importance=None):
            pass

        def attach(self, optimizer, by):
            pass

    failures = one_seed(s4_l2sp, L2SP=NoPull).failures
    assert any(f"'{s4_l2sp.TUNED}'" in line for line in failures)


def test_fusion_fails_with_a_random_map(one_seed):
    def chance(source, target):
        return s6_fusion.random_map(source, target, 600)

    assert one_seed(s6_fusion, fitted_map=chance).failures


def test_cross_domain_fails_if_nothing_is_blended(one_seed):
    failures = one_seed(
        s8_cross_domain,
        blended=lambda tuned, other, alpha: tuned,
        cross_validated=lambda rounds, pretrained, data, values, seed: (pretrained, values[0]),
        alpha_by_cross_validation=lambda pretrained, data, seed: 0.5,
    ).failures
    assert len(failures) == 2


def test_choosing_fails_by_a_score_that_is_backwards(one_seed):
    outcome = one_seed(
        s9_choosing_a_source,
        TARGETS=s9_choosing_a_source.TARGETS[:1],
        logme=lambda features, labels: -logme(features, labels),
    )
    assert any("'LogME' ranks" in line for line in outcome.failures)
    assert not any("'LEEP' ranks" in line for line in outcome.failures)


def test_the_page_on_choosing_shows_the_committed_run():
    page = (Path(__file__).parent.parent / "docs/choosing.md").read_text()
    assert readme.choice() in page
