"""That an installed package works: `python smoke_test.py [--cuda]`, in a folder that is not the source tree.

Every operation once against its formula in float64, on the kernels that the wheel came with. Needs torch and nothing
else. `--cuda` also asks for the CUDA library in the package, which a CPU build of torch cannot load.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasttransfer
from fasttransfer import L2SP, blend_, build_info, kd_loss


def close(name: str, ours: Tensor, exact: Tensor) -> None:
    """Or exit with 1."""
    error = float((ours.double() - exact).norm() / exact.norm())
    print(f"{name}: relative error {error:.1e}")
    if not error < 1e-5:
        sys.exit(f"error: {name} is wrong")


def distillation() -> None:
    """Value and gradient."""
    s, t, y = torch.randn(7, 1003), torch.randn(7, 1003), torch.randint(1003, (7,))
    ours = s.clone().requires_grad_()
    loss = kd_loss(ours, t, y, temperature=2.0, label_weight=0.3)
    loss.backward()
    wide = s.double().requires_grad_()
    log_p, log_q = F.log_softmax(wide / 2, -1), F.log_softmax(t.double() / 2, -1)
    exact = 0.3 * F.cross_entropy(wide, y) + 0.7 * 4 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    exact.backward()
    assert ours.grad is not None
    assert wide.grad is not None
    close("kd_loss", loss.detach(), exact.detach())
    close("its gradient", ours.grad, wide.grad)


def weights() -> None:
    """The pull to the start, and a blend."""
    model, other = nn.Linear(33, 17), nn.Linear(33, 17)
    reg = L2SP(model, 0.5, start=other)
    pairs = [
        (p.detach().double(), q.detach().double())
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
    ]
    value = reg.add_grad_()
    close("L2SP.add_grad_", value, torch.stack([0.5 * (p - q).square().sum() for p, q in pairs]).sum())
    assert model.weight.grad is not None
    close("its gradient", model.weight.grad, pairs[0][0] - pairs[0][1])
    blend_(model, other, 0.25)
    close("blend_", model.weight.detach(), 0.25 * pairs[0][0] + 0.75 * pairs[0][1])


def main(arguments: list[str]) -> None:
    """The command line."""
    torch.manual_seed(0)
    info = build_info()
    package = Path(fasttransfer.__file__).parent
    print(f"fasttransfer {fasttransfer.__version__} in {package}: {info}")
    here = {
        "version": fasttransfer.__version__,
        "build_info": info["version"],
        "metadata": version("fasttransfer"),
    }
    if len(set(here.values())) != 1:
        sys.exit(f"error: the versions differ: {here}")
    if not info["cpu_kernels"]:
        sys.exit(f"error: no native CPU kernels: {info['cpu_reason']}")
    if "--cuda" in arguments and not (package / "_cuda.so").is_file():
        sys.exit("error: the package has no CUDA library")
    bundled = [path.name for path in package.parent.glob("fasttransfer.libs/*")]
    if bundled:
        sys.exit(f"error: libraries were bundled that torch brings: {', '.join(bundled)}")
    distillation()
    weights()


if __name__ == "__main__":
    main(sys.argv[1:])
