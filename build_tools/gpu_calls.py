"""A short set of calls that reaches every kernel, for compute-sanitizer: `python -m build_tools.gpu_calls`.

Small, because the sanitizer makes them a hundred times slower; odd sizes and offsets, because that is where kernels
read too far. The results are compared with the CPU's only roughly: the tests do that better.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import fasttransfer as ft

# Several rows per block, a row in a block, a row in a cluster, two sweeps; the last element off every vector's end.
VOCABULARIES = (3, 257, 1024, 32003, 128257, 200001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kd(vocabulary: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocabulary)
    student, teacher = (
        torch.randn(5, vocabulary + 1, generator=generator).to(device, dtype) for _ in range(2)
    )
    labels = torch.tensor([0, 1, -100, 2, vocabulary - 1], device=device)
    leaf = student.requires_grad_(True)
    loss = ft.kd_loss(leaf[:, :-1], teacher[:, :-1], labels, temperature=2.0, label_weight=0.3)
    (loss * 1.5).backward()
    assert leaf.grad is not None
    return torch.stack([loss.detach().float().cpu(), leaf.grad.double().norm().float().cpu()])


def lists(_: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sizes = (1, 7, 4097, 0, 33000)
    start, params = ([torch.randn(n, generator=generator).to(device, dtype) for n in sizes] for _ in range(2))
    odd = torch.randn(1001, generator=generator).to(device, dtype)[1:]  # not aligned
    params, start = [p.requires_grad_(True) for p in [*params, odd]], [*start, odd * 0.5]
    value = ft.l2sp_add_grad_(params, start, 0.01)
    value = ft.l2sp_add_grad_(params, start, 0.01)
    ft.l2sp_prox_(params, start, 0.01, 0.1)
    targets = [p.detach() for p in params]
    alpha = torch.tensor(0.4, device=device, requires_grad=True)
    dots = torch.autograd.grad(ft.blend(targets, start, alpha), alpha, start)
    ft.blend_(targets, start, 0.9)
    ft.blend_many_(targets, [start, [s * 2 for s in start]], 0.4)
    grads = torch.cat([p.grad.float().flatten() for p in params if p.grad is not None])
    norms = [grads.norm(), torch.cat(targets).float().norm()]
    return torch.stack([t.float().cpu() for t in (value, *norms, *dots)])


def main(device: str = "cuda") -> int:
    calls: list[tuple[Callable[[int, torch.dtype, str], torch.Tensor], int]] = [(kd, v) for v in VOCABULARIES]
    for call, size in [*calls, (lists, 0)]:
        for dtype in DTYPES:
            ours, theirs = (call(size, dtype, where) for where in (device, "cpu"))
            if not torch.allclose(ours, theirs, rtol=2e-2):
                print(f"{call.__name__} {size} {dtype}: {ours.tolist()}, and on the CPU {theirs.tolist()}")
                return 1
    print("the calls for the sanitizer agree with the CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
