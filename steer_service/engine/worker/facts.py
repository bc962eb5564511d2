"""Facts about one worker and its model, which do not change.

Relies on (vLLM 0.24 to 0.33): `get_pp_group`, `get_tp_group` and `get_pp_indices`; `data_parallel_index` and `rank`,
which tell all workers apart. tests/engine/test_seams.py and every test with several workers notice a change.
"""

from dataclasses import dataclass
from typing import Any, Self

from vllm.distributed.parallel_state import get_pp_group, get_tp_group
from vllm.distributed.utils import get_pp_indices


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """The model on one worker, and the worker's place among the others."""

    layers: tuple[int, ...]
    """Layers with a hook on this rank, in order."""
    layer_count: int
    """Layers of the whole model."""
    stage_layers: int
    """Layers of the pipeline stage that has most."""
    hidden_size: int
    """Hidden size of the residual stream."""
    dtype: str
    """Dtype of the residual stream."""
    number: int
    """The worker's number among all workers of all data-parallel replicas."""
    stage: int
    """Its pipeline stage."""
    is_last_stage: bool
    """True on the last pipeline stage."""
    writes_rows: bool
    """True if the worker writes captured rows and marks, which are the same on every tensor-parallel rank."""

    @property
    def replies(self) -> bool:
        """True if vLLM reads the worker's outputs and errors; those of the other workers are lost."""
        return self.is_last_stage and self.writes_rows

    @classmethod
    def of(cls, worker: Any, layers: tuple[int, ...]) -> Self:
        """The facts of a vLLM worker that has loaded its model."""
        model = worker.model_config
        return cls(
            layers=layers,
            layer_count=model.get_total_num_hidden_layers(),
            stage_layers=_layers_of_largest_stage(model.get_total_num_hidden_layers()),
            hidden_size=model.get_hidden_size(),
            dtype=str(model.dtype).removeprefix("torch."),
            number=worker_number(worker),
            stage=get_pp_group().rank_in_group,
            is_last_stage=get_pp_group().is_last_rank,
            writes_rows=get_tp_group().rank_in_group == 0,
        )


def _layers_of_largest_stage(layers: int) -> int:
    stages = get_pp_group().world_size
    bounds = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    return max(end - start for start, end in bounds)


def worker_number(worker: Any) -> int:
    """The worker's number; vLLM's own `rank` begins at 0 in each replica."""
    return int(worker.parallel_config.data_parallel_index * worker.parallel_config.world_size + worker.rank)
