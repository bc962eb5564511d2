"""Facts about seams that only a running engine can tell, as JSON: python -m tests.engine.live_seams MODEL_FOLDER.

A process of its own, as the engine's worker runs in it.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from steer_service.ops.plan import RequestRows


def facts(model: str) -> dict[str, Any]:
    """What test_seams.py asserts, measured on an in-process engine of the V1 runner."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLMEngine, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.inputs import TokensPrompt

    from steer_service.engine.worker.batch_rows import watch_rows
    from tests.engine.recorded.record import ENGINE

    engine = LLMEngine.from_engine_args(EngineArgs(model=model, **ENGINE))
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    manager = core.scheduler.kv_cache_manager
    heard: list[int] = []
    held: set[int] = set()

    def listen(rows: Sequence[RequestRows]) -> None:
        heard.append(sum(part.row_count for part in rows))
        for part in rows:
            held.update(block for group in runner.requests[part.request_id].block_ids for block in group)

    watch_rows(runner, listen)

    def generate(name: str, salt: str, prompt: int) -> None:
        tokens = TokensPrompt(prompt_token_ids=[1000 + i for i in range(prompt)], cache_salt=salt)
        engine.add_request(name, tokens, SamplingParams(max_tokens=2, ignore_eos=True))
        while engine.has_unfinished_requests():
            engine.step()

    runner._dummy_run(3)
    heard_of_dummy = list(heard)
    hits: list[tuple[int, int]] = []
    find_longest_cache_hit = manager.coordinator.find_longest_cache_hit

    def find(block_hashes: Any, max_cache_hit_length: int, *args: Any, **kwargs: Any) -> Any:
        found = find_longest_cache_hit(block_hashes, max_cache_hit_length, *args, **kwargs)
        hits.append((max_cache_hit_length, found[1]))
        return found

    manager.coordinator.find_longest_cache_hit = find
    for name, salt in (("a", "one"), ("b", "one"), ("c", "two")):
        generate(name, salt, 70)
    layers = [name for group in runner.kv_cache_config.kv_cache_groups for name in group.layer_names]
    context = runner.vllm_config.compilation_config.static_forward_context
    caches = [context[name].kv_cache for name in layers]
    per_block = [
        cache.unflatten(0, (runner.kv_cache_config.num_blocks, -1)).flatten(1).abs().sum(1) for cache in caches
    ]
    runner._zero_block_ids(sorted(held))
    return {
        "heard_of_dummy": heard_of_dummy,
        "heard": heard,
        "hits": hits,
        "layers": len(layers),
        "num_blocks": runner.kv_cache_config.num_blocks,
        "shapes": [list(cache.shape) for cache in caches],
        "held": sorted(held),
        "written": [sums.nonzero().flatten().tolist() for sums in per_block],
        "left_after_zeroing": [float(cache.abs().sum()) for cache in caches],
    }


if __name__ == "__main__":
    print("FACTS " + json.dumps(facts(sys.argv[1])))
