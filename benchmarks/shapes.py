"""Parameter shapes of real models, written out so that no model library is needed to measure over them."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def _batch_norm(channels: int) -> Shapes:
    return [(channels,), (channels,)]


def _basic_block(inputs: int, outputs: int) -> Shapes:
    shapes = [(outputs, inputs, 3, 3), *_batch_norm(outputs), (outputs, outputs, 3, 3), *_batch_norm(outputs)]
    if inputs != outputs:  # the strided block has a 1x1 convolution on its shortcut
        shapes += [(outputs, inputs, 1, 1), *_batch_norm(outputs)]
    return shapes


def resnet18() -> Shapes:
    """The 62 parameters (11,689,512 numbers) of an ImageNet ResNet-18, in the order of `.parameters()`."""
    shapes: Shapes = [(64, 3, 7, 7), *_batch_norm(64)]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        shapes += _basic_block(inputs, outputs) + _basic_block(outputs, outputs)
        inputs = outputs
    return [*shapes, (1000, 512), (1000,)]


def _norm(width: int) -> Shapes:
    return [(width,), (width,)]


def _linear(outputs: int, inputs: int) -> Shapes:
    return [(outputs, inputs), (outputs,)]


def _transformer_block(width: int) -> Shapes:
    """Pre-norm: norm, attention (one matrix for q, k, v; one out), norm, two matrices of the MLP."""
    attention = _linear(3 * width, width) + _linear(width, width)
    mlp = _linear(4 * width, width) + _linear(width, 4 * width)
    return _norm(width) + attention + _norm(width) + mlp


def vit_b16() -> Shapes:
    """The 152 parameters (86,567,656 numbers) of an ImageNet ViT-B/16."""
    shapes: Shapes = [(1, 1, 768), (768, 3, 16, 16), (768,), (1, 197, 768)]
    for _ in range(12):
        shapes += _transformer_block(768)
    return shapes + _norm(768) + _linear(1000, 768)


def gpt2() -> Shapes:
    """The 148 parameters (124,439,808 numbers) of the smallest GPT-2, its head tied to the embedding."""
    shapes: Shapes = [(50257, 768), (1024, 768)]
    for _ in range(12):
        shapes += _transformer_block(768)
    return shapes + _norm(768)


def small_tensors() -> Shapes:
    """600 tensors of 16 to 1,024 numbers (121,920 in all): biases, norms, low-rank factors. Calling costs most here."""
    cycle: Shapes = [(16,), (64,), (64,), (128,), (8, 16), (8, 32), (32,), (4, 16), (256,), (1024,)]
    return [shape for _ in range(60) for shape in cycle]


def numbers(shapes: Shapes) -> int:
    """How many numbers tensors of these shapes hold."""
    count = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        count += size
    return count
