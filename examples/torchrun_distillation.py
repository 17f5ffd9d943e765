"""A language model distilled over several processes: FSDP2 over rows, a tensor-parallel head over columns.

    torchrun --nproc-per-node 2 -m examples.torchrun_distillation --tp 1      rows over 2 ranks (FSDP2)
    torchrun --nproc-per-node 2 -m examples.torchrun_distillation --tp 2      columns over 2 ranks
    torchrun --nproc-per-node 4 -m examples.torchrun_distillation --tp 2      a mesh of 2 x 2
    python -m examples.torchrun_distillation --ranks 4 --tp 2 --check         the same, started from here
    python -m examples.torchrun_distillation                                  one process: what all of them compute

Student and teacher are both sharded, in the same way: by ``fully_shard`` over the mesh's first dimension, each of whose
ranks has a part of the batch, and by ``parallelize_module`` over its second one, each of whose ranks has some of the
attention heads, of the hidden units and of the vocabulary. ``kd_loss`` takes the two models' logits as they come:
DTensors of some columns each (docs/parallel.md). The student is pulled to its start (``L2SP``) and averaged (``EMA``),
both on what a rank has of each parameter.

On GPUs with NCCL where torch has CUDA, else on the CPU with gloo: the same code. ``--check`` computes all losses once
more in one process, with the same seeds and batches, and fails unless they agree to 1e-5. The text is Python's own
argparse.py; the teacher's weights are random, as this is about where things are and not about what is learnt.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fasttransfer import EMA, L2SP, kd_loss

VOCABULARY = 256  # bytes
STUDENT, TEACHER = {"heads": 4, "layers": 2}, {"heads": 6, "layers": 3}
HEAD_WIDTH = 16
SEQUENCES, LENGTH = 8, 64
TOLERANCE = 1e-5

# ------------------------------------------------------------------------------------------------------- the model


class Block(nn.Module):
    """Attention and MLP. Of tensor parallelism it only knows that a rank may have fewer heads."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):  # [sequences, length, width]
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (-1, HEAD_WIDTH)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, heads, layers, seed):
        super().__init__()
        torch.manual_seed(seed)  # the same weights on every rank
        width = heads * HEAD_WIDTH
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


BLOCK_PLAN = {
    **dict.fromkeys(("query", "key", "value", "up"), ColwiseParallel()),
    **dict.fromkeys(("out", "down"), RowwiseParallel()),
}
# The logits stay as they are, each rank's columns: nobody ever has a whole row.
HEAD_PLAN = {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}


def shard(model, mesh):
    """Tensor parallelism first: FSDP then shards what each rank of the vocabulary has."""
    if mesh is not None and mesh["tp"].size() > 1:
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], BLOCK_PLAN)
        parallelize_module(model, mesh["tp"], HEAD_PLAN)
    if mesh is not None and mesh["dp"].size() > 1:
        for block in model.blocks:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


# -------------------------------------------------------------------------------------------------------- training


@dataclass
class Options:
    steps: int = 5
    lr: float = 0.05
    temperature: float = 2.0
    label_weight: float = 0.3
    pull: float = 0.01
    decay: float = 0.8


def batch(step, device):
    """(tokens, labels) [sequences, length] of a step, of all ranks; sequences end at different lengths."""
    text = torch.frombuffer(bytearray(inspect.getsource(argparse).encode()), dtype=torch.uint8).long()
    random = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH, (SEQUENCES,), generator=random)
    windows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
    tokens, labels = windows[:, :-1], windows[:, 1:].clone()
    for row, end in zip(
        labels, torch.randint(LENGTH // 4, LENGTH + 1, (SEQUENCES,), generator=random), strict=True
    ):
        row[end:] = -100
    return tokens.to(device), labels.to(device)


def train(mesh, device, options):
    """The losses of all steps, of the whole batch each, and that of the average after them; the same on all ranks."""
    dp, rank = (1, 0) if mesh is None else (mesh["dp"].size(), mesh["dp"].get_local_rank())
    student = shard(Transformer(**STUDENT, seed=1).to(device), mesh)
    teacher = shard(Transformer(**TEACHER, seed=2).to(device), mesh).requires_grad_(False)
    # SGD, as Adam would hide gradients that are wrong by a factor. foreach=False, as one call cannot take parameters on
    # different meshes: norms are split over one dimension, the layers in the plans over two.
    optimizer = torch.optim.SGD(student.parameters(), options.lr, momentum=0.9, foreach=False)
    L2SP(student, options.pull).attach(
        optimizer
    )  # its gradient, before each step; behind AdamW's, the proximal step
    ema = EMA(student, options.decay)

    def loss_of(step):
        """This rank's part of the loss: the mean over the ranks is that of the whole batch, as FSDP's gradients are."""
        tokens, labels = (t.chunk(dp)[rank] for t in batch(step, device))
        items = (labels != -100).sum()
        if dp > 1:
            dist.all_reduce(items, group=mesh["dp"].get_group())
        with torch.no_grad():
            teacher_logits = teacher(tokens)
        return kd_loss(
            student(tokens), teacher_logits, labels,
            temperature=options.temperature, label_weight=options.label_weight, num_items=items / dp,
        )  # fmt: skip

    def over_ranks(loss):
        loss = loss.detach().clone()
        if dp > 1:
            dist.all_reduce(loss, group=mesh["dp"].get_group())
        return loss.item() / dp

    losses = []
    for step in range(options.steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(student)
        losses.append(over_ranks(loss))
    with ema.applied(student), torch.no_grad():
        losses.append(over_ranks(loss_of(options.steps)))
    return losses


# ------------------------------------------------------------------------------------------------------ the program


def report(losses, beside, say):
    """Prints them; the relative differences."""
    names = [f"step {i}" for i in range(len(losses) - 1)] + ["average"]
    for i, (name, loss) in enumerate(zip(names, losses, strict=True)):
        say(f"{name:>8}  loss {loss:.7f}" + (f"  one process {beside[i]:.7f}" if beside else ""))
    return [abs(a - b) / abs(b) for a, b in zip(losses, beside, strict=True)] if beside else []


def run(tp_sizes, check, options):
    """Under torchrun, all ranks; else one process."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if "RANK" not in os.environ:
        report(train(None, device, options), None, print)
        return 0
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    say = print if rank == 0 else lambda *_: None
    alone = train(None, device, options) if check and rank == 0 else None
    differences = []
    for tp in tp_sizes:
        mesh = init_device_mesh(device.type, (world // tp, tp), mesh_dim_names=("dp", "tp"))
        say(f"{world} ranks on {device.type}: {world // tp} for rows (dp), {tp} for columns (tp)")
        differences += report(train(mesh, device, options), alone, say)
    dist.destroy_process_group()
    agree = all(difference <= TOLERANCE for difference in differences)  # False of NaN
    if alone:
        say(f"largest relative difference {max(differences):.1e}: {'agree' if agree else 'DO NOT AGREE'}")
    return 0 if agree else 1


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--tp", type=int, nargs="+", default=[1], help="ranks for the columns; several: one run each"
    )
    parser.add_argument("--ranks", type=int, help="start that many processes (otherwise torchrun does)")
    parser.add_argument("--steps", type=int, default=Options.steps)
    parser.add_argument("--check", action="store_true", help="compare with one process")
    args = parser.parse_args(arguments)
    ranks = int(os.environ.get("WORLD_SIZE", args.ranks or 1))
    heads = [model["heads"] for model in (STUDENT, TEACHER)]
    for tp in args.tp:
        if tp < 1 or ranks % tp or any(h % tp for h in heads):
            parser.error(
                f"--tp {tp} must divide the number of ranks, {ranks}, and those of attention heads, {heads}"
            )
        if ranks // tp > SEQUENCES:
            parser.error(f"{ranks // tp} ranks for rows: a batch has {SEQUENCES} sequences")
    if args.steps < 1 or (args.ranks is not None and args.ranks < 1):
        parser.error("--steps and --ranks must be at least 1")
    if args.check and ranks == 1 and "RANK" not in os.environ:
        parser.error("--check compares several ranks with one process: --ranks 2, or torchrun")
    if args.ranks and args.ranks > 1 and "RANK" not in os.environ:
        from torch.distributed.run import main as torchrun

        torchrun(
            ["--standalone", f"--nproc-per-node={args.ranks}", "-m", "examples.torchrun_distillation",
             *(sys.argv[1:] if arguments is None else arguments)]
        )  # fmt: skip
        return 0
    return run(args.tp, args.check, Options(steps=args.steps))


if __name__ == "__main__":
    sys.exit(main())
