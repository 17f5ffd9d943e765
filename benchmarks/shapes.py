"""Parameter shapes of real models, written out so that no model library is needed to measure over them."""

from __future__ import annotations


def _batch_norm(channels: int) -> list[tuple[int, ...]]:
    return [(channels,), (channels,)]


def _basic_block(inputs: int, outputs: int) -> list[tuple[int, ...]]:
    shapes = [(outputs, inputs, 3, 3), *_batch_norm(outputs), (outputs, outputs, 3, 3), *_batch_norm(outputs)]
    if inputs != outputs:  # the strided block has a 1x1 convolution on its shortcut
        shapes += [(outputs, inputs, 1, 1), *_batch_norm(outputs)]
    return shapes


def resnet18() -> list[tuple[int, ...]]:
    """The 62 parameters (11,689,512 numbers) of an ImageNet ResNet-18, in the order of `.parameters()`."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), *_batch_norm(64)]
    inputs = 64
    for outputs in (64, 128, 256, 512):
        shapes += _basic_block(inputs, outputs) + _basic_block(outputs, outputs)
        inputs = outputs
    return [*shapes, (1000, 512), (1000,)]
