"""Small checkpoints for the tests of blending them on disk."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file


def tensors(seed, **changes):
    """A small model of every supported kind of tensor."""
    torch.manual_seed(seed)
    return {
        "embed.weight": torch.randn(300, 16).bfloat16(),
        "layers.0.weight": torch.randn(40, 30),
        "layers.0.bias": torch.randn(40),
        "layers.1.weight": torch.randn(40, 30),
        "layers.1.bias": torch.randn(40).half(),
        "norm.scale": torch.randn(()).double(),
        "steps": torch.tensor([seed, 7]),
        "mask": torch.tensor([True, False, seed > 0]),
        "empty": torch.zeros(0, 3),
        **changes,
    }


def save_pair(tmp_path):
    """Two such models, and their files."""
    a, b = tensors(1), tensors(2)
    save_file(a, tmp_path / "a.safetensors", metadata={"format": "pt", "of": "a"})
    save_file(b, tmp_path / "b.safetensors")
    return a, b, tmp_path / "a.safetensors", tmp_path / "b.safetensors"


def save(path, values, **metadata):
    save_file(values, path, metadata=metadata or None)
    return path


def shard(folder, values, files=3):
    """As transformers saves a large model."""
    folder.mkdir()
    names = sorted(values)
    weight_map = {n: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, n in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({n: values[n] for n in names if weight_map[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0, "note": "kept"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load_folder(folder):
    return {name: t for f in sorted(folder.glob("*.safetensors")) for name, t in load_file(f).items()}


def assert_same(got, expected):
    assert set(got) == set(expected)
    for name, t in expected.items():
        assert got[name].dtype == t.dtype, name
        assert torch.equal(got[name], t), name
