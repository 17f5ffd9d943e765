"""The Python blocks of README.md and docs/*.md run, in order, in one namespace per file that begins with stand-ins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

# Pages whose blocks need more than one process: where they are run instead.
ELSEWHERE = {"parallel.md": "tests/sharded_worker.py"}

IMPORTS = """
import torch
import torch.nn.functional as F
from torch import nn
from fasttransfer import *
"""

# What a page takes as given, small.
SETUP = {
    "README.md": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 512, 3)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 10)

    def forward(self, x):
        return self.fc(self.avgpool(self.conv(x)).flatten(1))

model, target, source = Net(), Net(), Net()
T, w, strength, alpha = 4.0, 0.3, 0.01, 0.9
s, t, labels = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10), torch.randint(10, (8,))
start = [p.detach().clone() for p in model.parameters()]
loss = sum(p.sum() for p in model.parameters())
loader = [(torch.randn(20, 3, 4, 4), torch.arange(20) % 2) for _ in range(2)]
target_features = torch.randn(40, 256)

def evaluate(blended):
    return -sum(float(p.detach().square().sum()) for p in blended.parameters())

def fit(strength, train, validation):
    yield strength
""",
    "blending.md": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x))

target, source, model, a, b, c, base, tuned_a, tuned_b = (Net() for _ in range(9))
x, y = torch.randn(20, 6), torch.randint(3, (20,))
narrow_features, wide_features = torch.randn(50, 16), torch.randn(50, 24)
narrow_maps, wide_maps = torch.randn(4, 8, 5, 5), torch.randn(4, 12, 5, 5)
narrow_layer, wide_layer = nn.Linear(8, 16), nn.Linear(12, 24)
narrow_inputs, wide_inputs = torch.randn(50, 8), torch.randn(50, 12)

def validate(model):
    return (model(x).argmax(1) == y).float().mean().item()
""",
    "distillation.md": """
class Model(nn.Module):
    def __init__(self, width, vocabulary):
        super().__init__()
        self.body = nn.Embedding(20, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        return self.head(self.body(tokens))

student_width, teacher_width = 6, 10
student, teacher = Model(student_width, 20), Model(teacher_width, 20)
student_logits, teacher_logits = torch.randn(8, 20, requires_grad=True), torch.randn(8, 20)
wider_teacher_logits = torch.randn(8, 24)
labels = torch.randint(20, (8,))
tokens = torch.randint(20, (3, 7))
batches = [torch.randint(20, (2, 5)) for _ in range(3)]
rows_per_batch = 10
micro_batches = [(torch.randint(20, (2, n)), torch.randint(20, (2, n))) for n in (3, 5)]
flat_student_logits = torch.randn(30, 20, requires_grad=True)
student_features, teacher_features = torch.randn(2, 5, student_width), torch.randn(2, 5, teacher_width)
attention_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
""",
    "l2sp.md": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.backbone(x).relu())

torch.manual_seed(0)
model, pretrained = Net(), Net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = [(torch.randn(32, 6), torch.randint(3, (32,))) for _ in range(3)]
""",
    "language_models.md": """
from transformers import LlamaConfig, LlamaForCausalLM

def llama(width):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    ))

student, teacher = llama(16), llama(32).eval().requires_grad_(False)
tokens, folder = torch.randint(256, (2, 9)), "cache"
""",
    "choosing.md": """
class Source(nn.Module):
    def __init__(self):
        super().__init__()
        self.neck, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.neck(x))

sources = {"a": Source(), "b": Source()}
source, images, labels = sources["a"], torch.randn(30, 5), torch.arange(30) % 3
loader = [(images, labels)]
""",
    "integrations.md": """
class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU()), nn.Linear(8, 8)

    def forward(self, x):
        return self.layer2(self.layer1(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = Backbone(), nn.Linear(8, 3)

net = Net()
sentences = [{"input_ids": torch.randint(1, 64, (n,))} for n in (5, 9, 4, 8)]

def collator(examples):
    pad = nn.utils.rnn.pad_sequence
    batch = {"input_ids": pad([x["input_ids"] for x in examples], batch_first=True)}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == 0, -100)
    if "teacher_row" in examples[0]:
        batch["teacher_row"] = torch.tensor([x["teacher_row"] for x in examples])
    return batch

pretrained = Backbone().state_dict()
student, teacher = nn.Linear(5, 3), nn.Sequential(Backbone(), nn.Linear(8, 3))
loader = validation_loader = torch.utils.data.DataLoader([(torch.randn(5), i % 3) for i in range(24)], 8)
""",
}
NEEDS = {
    "distillation.md": ("safetensors",),
    "blending.md": ("safetensors",),
    "l2sp.md": ("safetensors",),
    "integrations.md": ("lightning", "transformers", "accelerate", "safetensors"),
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    if page.name in ELSEWHERE:
        pytest.skip(f"runs on several ranks, in {ELSEWHERE[page.name]}")
    for library in NEEDS.get(page.name, ()):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks or "```python" not in text
    setup = compile(IMPORTS + SETUP.get(page.name, ""), f"setup of {page.name}", "exec")

    def fresh():
        namespace = {"__name__": page.stem}
        exec(setup, namespace)
        return namespace

    namespace = fresh()
    for block in blocks:
        # Behind as many empty lines as the page has before it: a traceback then names the page's own line.
        code = "\n" * text.count("\n", 0, block.start(1)) + block[1]
        before, replacement, after = code.partition("# after\n")
        if not replacement:
            exec(compile(code, str(page), "exec"), namespace)
            continue
        for half in (before, "\n" * before.count("\n") + replacement + after):  # the one or the other
            exec(compile(half, str(page), "exec"), fresh())


def test_pages_that_run_elsewhere_are_there():
    for page, where in ELSEWHERE.items():
        assert page in (ROOT / where).read_text()


def test_lines_of_the_conventions_table():
    """The last column of the guide's table gives what the first one does, as compat or a formula has it."""
    text = (ROOT / "docs" / "distillation.md").read_text()
    table = text[text.index("| what you call |") : text.index("To keep in mind")].strip().splitlines()[2:]
    namespace = {}
    exec(
        IMPORTS + "from fasttransfer.compat import functional, mdistiller, torchdistill, torchtune, trl",
        namespace,
    )
    namespace |= {
        "s": torch.randn(3, 9), "t": torch.randn(3, 9), "y": torch.tensor([1, 2, -100]), "T": 2.0, "beta": 0.3,
        "alpha": 0.4, "n": 5, "h": torch.randn(3, 4), "W": torch.randn(9, 4), "ht": torch.randn(3, 5),
        "Wt": torch.randn(9, 5), "log_q": torch.full((3, 2), -1.5), "ids": torch.tensor([[0, 1]] * 3),
    }  # fmt: skip
    originals = {
        "F.kl_div(": 'F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean")',
        "TRL": "trl.generalized_jsd_loss(s, t, y, beta, T)",
        "ReverseKLLoss": "torchtune.ReverseKLLoss()(s, t, y)",
        "mdistiller `kd_loss": "mdistiller.kd_loss(s, t, T)",
        "its fork": "mdistiller.kd_loss(s, t, T, logit_stand=True)",
        # Targets of -100 are an error there.
        "dkd_loss": "mdistiller.dkd_loss(s, t, y, alpha, beta, T)",
        "torchdistill": "torchdistill.LogitsKDLoss(T, alpha)(s, t, y)",
        "`alpha` None": "torchdistill.LogitsKDLoss(T)(s, t)",
        "Automodel": "T * T * trl.generalized_jsd_loss(s, t, y, 0, T, num_items_in_batch=n)",
        "LigerFused": "0.5 * F.cross_entropy(h @ W.T, y) + 0.5 * trl.generalized_jsd_loss(h @ W.T, ht @ Wt.T, y)",
        "speculators": "trl.generalized_jsd_loss(s, t, beta=0.5, reduction='none').sum(-1)",
        "verl": "(log_q.exp() * (log_q - F.log_softmax(s, -1)[:, :2])).sum(-1)",
    }
    compared = set()
    for row in table:
        *_, call = re.split(r" \| ", row.strip("| "))
        found = re.match(r"`((?:\w+_)?kd_loss\(.*?\))`", call)
        original = next((key for key in originals if key in row), None)
        if found is None or original is None or original in compared:
            continue
        ours = eval(found[1].replace("divergence=...", "divergence='jsd'"), namespace)
        torch.testing.assert_close(
            ours, eval(originals[original], namespace), msg=lambda m, row=row: f"{row}: {m}"
        )
        compared.add(original)
    assert compared == set(originals)
