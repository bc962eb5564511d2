"""vLLM's own scheduler, with a limit on the rows of a request that may come from the prefix cache.

Captured rows must be computed in their own request. The prefix before the first captured row is reused as usual. vLLM
itself can only skip the whole prefix cache (`skip_reading_prefix_cache`).

Relies on (vLLM 0.24 to 0.33): `SchedulerConfig.scheduler_cls` naming a callable that takes the scheduler's keywords;
`kv_cache_manager.get_computed_blocks(request, ...)`, which asks `coordinator.find_longest_cache_hit(block_hashes,
max_cache_hit_length)` for at most that many tokens; the scheduler's `structured_output_manager`.
tests/engine/test_seams.py notices a change.
"""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from steer_service.engine.heart import start_heart
from steer_service.engine.messages import reusable_rows
from steer_service.engine.vllm_patches.constraint_budget import limit_constraints
from steer_service.engine.vllm_patches.parent_watchdog import exit_with_parent
from steer_service.engine.vllm_patches.quick_end import skip_teardown


def steering_scheduler(*, vllm_config: Any, **keywords: Any) -> Scheduler:
    """Makes vLLM's own scheduler, with prefix hits that end at a request's first captured row.

    Only the engine core calls this, while it starts. The parent watchdog and the heart are therefore started here. When
    it shuts down, its process ends quickly.
    """
    exit_with_parent()
    start_heart()
    kind = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    scheduler = kind(vllm_config=vllm_config, **keywords)
    limit_prefix_hits(scheduler.kv_cache_manager)
    limit_constraints(scheduler.structured_output_manager)
    _end_quickly(scheduler)
    return scheduler


def _end_quickly(scheduler: Any) -> None:
    shutdown = scheduler.shutdown

    def shutdown_and_end() -> None:
        skip_teardown()
        shutdown()

    scheduler.shutdown = shutdown_and_end


def limit_prefix_hits(manager: Any) -> None:
    """Makes this KV-cache manager reuse at most `WorkerRequest.reusable_rows` rows of a steered or captured request."""
    get_computed_blocks = manager.get_computed_blocks
    find_longest_cache_hit = manager.coordinator.find_longest_cache_hit
    limit: int | None = None

    def limited_blocks(request: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal limit
        limit = reusable_rows(request.sampling_params.extra_args if request.sampling_params is not None else None)
        try:
            return get_computed_blocks(request, *args, **kwargs)
        finally:
            limit = None

    def limited_hit(block_hashes: Any, max_cache_hit_length: int, *args: Any, **kwargs: Any) -> Any:
        if limit is not None:
            max_cache_hit_length = min(max_cache_hit_length, limit)
        return find_longest_cache_hit(block_hashes, max_cache_hit_length, *args, **kwargs)

    manager.get_computed_blocks = limited_blocks  # on the instances: other engines in this process are unchanged
    manager.coordinator.find_longest_cache_hit = limited_hit
