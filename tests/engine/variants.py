"""Made by hand from a tiny model: LoRA adapters with their merged twins, and an int8 checkpoint with its oracle."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.engine.oracle import Oracle

RANK, ALPHA = 4, 8
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")

LARGEST = 63
"""Of quantised weights: where a CPU has AVX2 only, oneDNN's int8 products overflow beyond that and are wrong."""

Weights = dict[str, torch.Tensor]


def make_adapter(base: Path, folder: Path, merged: Path, seed: int) -> None:
    """An adapter as PEFT saves it, in `folder`, and the model that it makes of `base`, in `merged`."""
    torch.manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    adapter: Weights = {}
    for name in [name for name in weights if name.removesuffix(".weight").endswith(ADAPTED)]:
        rows, columns = weights[name].shape
        down, up = 0.1 * torch.randn(RANK, columns), 0.1 * torch.randn(rows, RANK)
        stem = "base_model.model." + name.removesuffix(".weight")
        adapter |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        weights[name] = weights[name].double() + ALPHA / RANK * up.double() @ down.double()
    folder.mkdir(parents=True)
    save_file(adapter, folder / "adapter_model.safetensors")
    modules = [name.split(".")[1] for name in ADAPTED]
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    shutil.copytree(base, merged)
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})


def make_int8(base: Path, quantised: Path, rounded: Path) -> None:
    """`base` with int8 weights and activations quantised per token, and the float model with the same weights."""
    weights = load_file(base / "model.safetensors")
    stored: Weights = {}
    for name, weight in list(weights.items()):
        if not name.endswith("_proj.weight"):
            stored[name] = weight
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST
        steps = torch.round(weight / scale)
        weights[name] = steps * scale
        stored |= {name: steps.to(torch.int8), name.replace(".weight", ".weight_scale"): scale}
    for folder, content in ((quantised, stored), (rounded, weights)):
        shutil.copytree(base, folder)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = QUANTISATION
    (quantised / "config.json").write_text(json.dumps(config))


def _int8(**other: object) -> dict[str, object]:
    return {"num_bits": 8, "type": "int", "symmetric": True, **other}


QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _int8(strategy="channel", dynamic=False),
            "input_activations": _int8(strategy="token", dynamic=True),
        }
    },
}


class Int8Oracle(Oracle):
    """Rounds what goes into each linear layer as the kernels do, token by token."""

    def __init__(self, rounded: Path) -> None:
        super().__init__(rounded)
        for name, module in self._model.named_modules():
            if name.endswith("_proj"):
                module.register_forward_pre_hook(lambda _, args: (_rounded(args[0]), *args[1:]))


def _rounded(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return torch.round(x / scale).clamp(-128, 127) * scale
