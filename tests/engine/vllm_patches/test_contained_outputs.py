"""An error in the output of one request, which vLLM's output processor raises, is that request's alone."""

import logging
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor, OutputProcessorOutput, RequestOutputCollector
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


class OneFails:
    """An output processor in which one request ends at a stop string, and the output of the next one raises."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {"stopped": object(), "going on": object()}

    def process_outputs(self, outputs: Any) -> OutputProcessorOutput:
        processed = OutputProcessorOutput(request_outputs=[], reqs_to_abort=[])
        for one in outputs:
            if one.request_id == "broken":
                raise ZeroDivisionError
            if one.request_id == "stopped":
                del self.request_states["stopped"]
                processed.reqs_to_abort.append("stopped")
        return processed


def test_a_request_that_stopped_before_one_that_raises_is_still_aborted() -> None:
    processor = OneFails()
    contain_failures(processor)
    names = ("going on", "stopped", "broken", "going on")

    processed = processor.process_outputs([EngineCoreOutput(request_id=name, new_token_ids=[3]) for name in names])

    assert processed.reqs_to_abort == ["stopped"]


def test_the_outputs_of_a_step_are_processed_in_one_call_while_none_raises() -> None:
    processor = OneFails()
    calls: list[int] = []
    process = processor.process_outputs
    processor.process_outputs = lambda outputs: calls.append(1) or process(outputs)  # type: ignore[func-returns-value, method-assign]
    contain_failures(processor)

    processor.process_outputs([EngineCoreOutput(request_id="going on", new_token_ids=[3]) for _ in range(5)])

    assert len(calls) == 1
