"""Quantised checkpoints of a tiny model, made by hand, and the float model with the same rounded weights.

The layouts are those that the files of AutoAWQ, AutoGPTQ and compressed-tensors have on disk.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 32
"""Rows of the input that share a scale."""

LEVELS = 15
"""Largest of 4 bits."""

PACKED = 8
"""Numbers of 4 bits in an int32."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbouring columns AWQ writes at each place of an int32."""

Weights = dict[str, torch.Tensor]
Quantise = Callable[[torch.Tensor], tuple[Weights, torch.Tensor]]
"""From a weight, shape [out, in]: the tensors that are stored for it by their last name, and the rounded weight."""


def make_quantised(base: Path, quantised: Path, rounded: Path, kind: str) -> None:
    """Writes `base` as a checkpoint of `kind`, a key of KINDS, and as a float model with the same weights."""
    quantise, settings = KINDS[kind]
    weights = load_file(base / "model.safetensors")
    stored: Weights = {}
    for name, weight in list(weights.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        parts, weights[name] = quantise(weight)
        stored |= {name.removesuffix("weight") + part: tensor for part, tensor in parts.items()}
    for folder, content in ((quantised, stored), (rounded, weights)):
        shutil.copytree(base, folder)
        tensors = {name: tensor.contiguous() for name, tensor in content.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = settings
    (quantised / "config.json").write_text(json.dumps(config))


def _levels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Steps [in, out] of 0 to 15, zeros [groups, out], scales [groups, out] and the rounded weight [out, in]."""
    groups = weight.t().reshape(-1, GROUP, weight.shape[0])
    low, high = groups.amin(dim=1), groups.amax(dim=1)
    scales = ((high - low) / LEVELS).half().float()  # files have them in half precision
    zeros = torch.round(-low / scales).clamp(1, LEVELS)
    steps = (torch.round(groups / scales[:, None]) + zeros[:, None]).clamp(0, LEVELS)
    rounded = ((steps - zeros[:, None]) * scales[:, None]).reshape(weight.t().shape).t()
    return steps.reshape(weight.t().shape).int(), zeros.int(), scales, rounded


def _packed(numbers: torch.Tensor, order: tuple[int, ...] = tuple(range(PACKED))) -> torch.Tensor:
    """Eight neighbours of the last dimension in one int32, the first in the lowest bits."""
    eights = numbers.reshape(*numbers.shape[:-1], -1, PACKED)[..., list(order)].long()
    whole = (eights << (4 * torch.arange(PACKED))).sum(dim=-1)
    return torch.where(whole >= 1 << 31, whole - (1 << 32), whole).int()


def _awq(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    steps, zeros, scales, rounded = _levels(weight)
    parts = {"qweight": _packed(steps, AWQ_ORDER), "qzeros": _packed(zeros, AWQ_ORDER), "scales": scales.half()}
    return parts, rounded


def _gptq(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    """With zeros in the middle, as `sym` asks; files store them less one."""
    groups = weight.t().reshape(-1, GROUP, weight.shape[0])
    scales = (groups.abs().amax(dim=1) / 7).half().float()
    steps = (torch.round(groups / scales[:, None]) + 8).clamp(0, LEVELS)
    rounded = ((steps - 8) * scales[:, None]).reshape(weight.t().shape).t()
    flat = steps.reshape(weight.t().shape).int()
    parts = {
        "qweight": _packed(flat.t()).t(),
        "qzeros": _packed(torch.full_like(scales, 7).int()),
        "scales": scales.half(),
        "g_idx": torch.arange(flat.shape[0], dtype=torch.int32) // GROUP,
    }
    return parts, rounded


def _packed_groups(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    groups = weight.reshape(weight.shape[0], -1, GROUP)
    scales = (groups.abs().amax(dim=2) / 7).half().float()
    steps = (torch.round(groups / scales[..., None])).clamp(-8, 7)
    rounded = (steps * scales[..., None]).reshape(weight.shape)
    parts = {
        "weight_packed": _packed((steps + 8).reshape(weight.shape).int()),
        "weight_scale": scales.half(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    return parts, rounded


def _fp8(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale.reshape(1)}, stored.float() * scale


def _fp8_channels(weight: torch.Tensor) -> tuple[Weights, torch.Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }


def _float8(strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": dynamic}


KINDS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "w4a16": (
        _packed_groups,
        _compressed(
            "pack-quantized",
            {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
            None,
        ),
    ),
    "fp8": (_fp8, {"quant_method": "fp8", "activation_scheme": "dynamic"}),
    "fp8_compressed": (
        _fp8_channels,
        _compressed("float-quantized", _float8("channel", dynamic=False), _float8("token", dynamic=True)),
    ),
}
"""Kind -> how its weights are made, and the `quantization_config` of its config.json."""
