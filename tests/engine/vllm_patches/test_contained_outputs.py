"""An error in the output of one request, which vLLM's output processor raises, is that request's alone."""

import logging
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.outputs import LogprobsLists

from steer_service.engine.vllm_patches.contained_outputs import contain_failures


def request(name: str) -> EngineCoreRequest:
    params = SamplingParams(detokenize=False, logprobs=1, output_kind=RequestOutputKind.DELTA)
    return EngineCoreRequest(
        request_id=name,
        external_req_id=name,
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


def output(name: str, *, is_broken: bool) -> EngineCoreOutput:
    ranks: Any = [None] if is_broken else np.zeros(1, np.int32)
    logprobs = LogprobsLists(np.zeros((1, 2), np.int32), np.zeros((1, 2), np.float32), ranks, None)
    return EngineCoreOutput(request_id=name, new_token_ids=[3], new_logprobs=logprobs)


def processor_with(*names: str) -> tuple[OutputProcessor, dict[str, RequestOutputCollector]]:
    processor = OutputProcessor(None, log_stats=False)
    queues = {}
    for name in names:
        queues[name] = RequestOutputCollector(RequestOutputKind.DELTA, name)
        processor.add_request(request(name), "a secret prompt", None, 0, queues[name])
    return processor, queues


OUTPUTS = [output("first", is_broken=False), output("second", is_broken=True), output("third", is_broken=False)]


async def test_vllm_alone_stops_at_the_request_that_raises() -> None:
    processor, queues = processor_with("first", "second", "third")

    with pytest.raises(AttributeError):
        processor.process_outputs(OUTPUTS)

    assert queues["third"].get_nowait() is None


async def test_only_the_request_that_raises_fails(caplog: pytest.LogCaptureFixture) -> None:
    processor, queues = processor_with("first", "second", "third")
    contain_failures(processor)

    with caplog.at_level(logging.ERROR):
        processed = processor.process_outputs(OUTPUTS)

    assert (processed.request_outputs, processed.reqs_to_abort) == ([], [])
    with pytest.raises(AttributeError):
        await queues["second"].get()
    for name in ("first", "third"):
        assert list((await queues[name].get()).outputs[0].token_ids) == [3]
    [record] = caplog.records
    assert "AttributeError in LogprobsProcessor._update_sample_logprobs" in record.getMessage()
    assert "secret" not in caplog.text


async def test_an_output_of_a_request_that_is_gone_is_left_out() -> None:
    processor, _ = processor_with()
    contain_failures(processor)

    assert processor.process_outputs(OUTPUTS).request_outputs == []
