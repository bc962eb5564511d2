"""The deterministic model for vLLM: real attention and KV cache, no weights; see rules.py for what it computes."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import make_empty_intermediate_tensors_factory, make_layers
from vllm.sequence import IntermediateTensors

from tests.engine.deterministic_model import rules, worker_faults


class DeterministicDecoderLayer(nn.Module):
    """Returns (hidden, residual) as Llama's does: what the layer adds, and the stream that came in."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        size = get_tensor_model_parallel_world_size()
        self.heads = rules.HEADS // size
        self.first = self.heads * get_tensor_model_parallel_rank()
        self.attn = Attention(
            self.heads,
            rules.HEAD_SIZE,
            1.0,
            num_kv_heads=self.heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )
        self.register_buffer("hash_weights", torch.tensor(rules.hash_weights()), persistent=False)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream = hidden if residual is None else hidden + residual
        rows = stream.shape[0]
        columns = stream[:, : rules.END].to(torch.int64)
        hashes = (columns.unsqueeze(2) * self.hash_weights).sum(1) % rules.HASH_MODULUS
        mine = (hashes * hashes % rules.HASH_MODULUS)[:, self.first : self.first + self.heads].to(torch.float32)
        values = mine.unsqueeze(2).expand(-1, -1, rules.HEAD_SIZE).reshape(rows, -1).contiguous()
        nothing = torch.zeros_like(values)
        means = self.attn(nothing, nothing, values).view(rows, self.heads, rules.HEAD_SIZE)  # all keys are alike
        seen = (positions + 1).unsqueeze(1)
        sums = torch.zeros(rows, rules.HEADS, dtype=torch.float32)
        sums[:, self.first : self.first + self.heads] = torch.round(means.mean(2) * seen)
        sums = tensor_model_parallel_all_reduce(sums).to(torch.int64)
        context = columns[:, rules.CONTEXT : rules.MARKS]
        added = torch.zeros_like(stream)
        added[:, rules.CONTEXT : rules.MARKS] = ((3 * context + sums) % rules.CONTEXT_MODULUS - context).to(
            stream.dtype
        )
        added[:, rules.LAYER] = 1.0
        return added, stream


@support_torch_compile(
    dynamic_arg_dims={"input_ids": {0: "b"}, "positions": {0: "b"}, "intermediate_tensors": {0: "b"}}
)
class DeterministicModel(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.start_layer, self.end_layer, self.layers = make_layers(
            vllm_config.model_config.hf_config.num_hidden_layers,
            lambda prefix: DeterministicDecoderLayer(vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], rules.WIDTH
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            assert input_ids is not None
            hidden, residual = embed(input_ids, positions), None
        else:
            assert intermediate_tensors is not None
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden, residual = layer(positions, hidden, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        return hidden + residual


def embed(input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    hidden = torch.zeros(input_ids.shape[0], rules.WIDTH, dtype=torch.float32)
    hidden[:, rules.POSITION] = positions.to(torch.float32)
    hidden[:, rules.TOKEN] = input_ids.to(torch.float32)
    return hidden


class DeterministicForCausalLM(nn.Module, SupportsPP):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        worker_faults.install()
        self.model = DeterministicModel(vllm_config=vllm_config, prefix="model")
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        self.register_buffer("choice_weights", torch.tensor(rules.choice_weights()), persistent=False)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("the position is part of the embedding")

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        start = (hidden_states[:, : rules.END].to(torch.int64) * self.choice_weights).sum(1)
        logits = torch.zeros(hidden_states.shape[0], rules.VOCABULARY)
        rows = torch.arange(hidden_states.shape[0])
        for choice in range(rules.CHOICES):
            span = rules.LAST_TOKEN - rules.FIRST_TOKEN
            token = rules.FIRST_TOKEN + (start + rules.CHOICE_DISTANCE * choice) % span
            logits[rows, token] = rules.CHOICE_LOGIT - rules.CHOICE_STEP * choice
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return set()
