"""The host's half of vLLM's V2 runner, for machines without Triton: its ordering, padding and bookkeeping of a step.

`prepare_inputs` is vLLM's. Of the kernels that it launches, the one that computes positions is written out in torch,
from the tensors that the device would read; the others, which fill token ids and logits, do nothing here.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.input_batch import InputBuffers

from tests.engine.recorded.steps import Step

ROOM = 8
"""Requests that the runner can hold."""

CPU = torch.device("cpu")


class HostV2(model_runner.GPUModelRunner):
    """A V2 runner that holds the requests of one recorded step and has no model."""

    def __init__(self, step: Step) -> None:
        names = sorted(step.scheduled, reverse=True)  # places in its tables that are not the batch's order
        parts = {name: (count, position) for name, count, position in step.fed}
        computed = np.zeros(ROOM, np.int32)
        prefill = np.zeros(ROOM, np.int32)
        for place, name in enumerate(names, start=1):
            count, position = parts[name]
            computed[place] = position
            prefill[place] = position + count if count > 1 and name not in step.drafts else position
        self.device = CPU
        self.max_num_reqs = ROOM
        self.decode_query_len = 1 + max(step.drafts.values(), default=0)
        self.use_pp = self.use_dcp = False
        self.adaptive_verification = self.pcp_manager = self.fast_prefill = None
        self.model_config = SimpleNamespace(rswa_window=None)
        self.model_state = SimpleNamespace(num_new_sampled_tokens_per_step=1)
        self.input_buffers = InputBuffers(max_num_reqs=ROOM, max_num_tokens=256, device=CPU)
        self.req_states = SimpleNamespace(
            req_id_to_index={name: place for place, name in enumerate(names, start=1)},
            num_computed_tokens_np=computed,
            num_computed_tokens=SimpleNamespace(gpu=torch.from_numpy(computed.copy())),
            num_computed_prefill_tokens=np.minimum(computed, prefill),
            prefill_len=SimpleNamespace(np=prefill, gpu=torch.from_numpy(prefill)),
            next_prefill_tokens=None,
            all_token_ids=SimpleNamespace(gpu=None),
            last_sampled_tokens=None,
            draft_tokens=None,
        )

    def step(self, step: Step, *, padded: int, padded_tokens: int) -> Any:
        """Prepares the step as execute_model does and returns its batch."""
        total = sum(step.scheduled.values())
        schedule = SimpleNamespace(
            num_scheduled_tokens=step.scheduled,
            total_num_scheduled_tokens=total,
            scheduled_spec_decode_tokens={name: [0] * count for name, count in step.drafts.items()},
            has_structured_output_requests=False,
        )
        batch = SimpleNamespace(
            num_tokens=total + padded_tokens, num_reqs=len(step.scheduled) + padded if padded else None
        )
        if not hasattr(model_runner.GPUModelRunner, "gather_batch_req_state"):  # 0.24
            return self.prepare_inputs(schedule, batch)
        state, _ = self.gather_batch_req_state(schedule, dummy_run=False)
        return self.prepare_inputs(schedule, state, batch, 0)


def without_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the kernels that prepare_inputs launches."""

    def prepare_pos_seq_lens(mapping: Any, starts: Any, computed: Any, positions: Any, seq_lens: Any) -> None:
        for request, place in enumerate(mapping.tolist()):
            first, end = starts[request].item(), starts[request + 1].item()
            positions[first:end] = computed[place] + torch.arange(end - first)

    def async_copy_to_gpu(values: np.ndarray, out: torch.Tensor | None = None, device: Any = None) -> torch.Tensor:
        copied = torch.from_numpy(values.copy())
        return copied if out is None else out.copy_(copied)

    if hasattr(model_runner, "async_copy_to_gpu"):  # 0.24; what later versions copy with works on a CPU
        monkeypatch.setattr(model_runner, "async_copy_to_gpu", async_copy_to_gpu)
    monkeypatch.setattr(model_runner, "prepare_pos_seq_lens", prepare_pos_seq_lens)
    monkeypatch.setattr(model_runner, "prepare_prefill_inputs", lambda *args: None)
    monkeypatch.setattr(model_runner, "combine_sampled_and_draft_tokens", lambda *args: None)
    monkeypatch.setattr(model_runner, "expand_idx_mapping", lambda mapping, *args: (mapping, None))
