"""ModelInfo as a message, and the contract's files as stubs."""

from dataclasses import replace

from hypothesis import given

from steer_service.core.start_proof import StartProof
from steer_service.testing.fake_backend import FAKE_MODEL
from steer_service.wire import capture_pb2, generation_pb2, info_pb2, steering_pb2, tokenizer_pb2
from steer_service.wire.info import (
    model_info_from_proto,
    model_info_to_proto,
    start_proof_from_proto,
    start_proof_to_proto,
)
from tests.wire import strategies


@given(strategies.model_infos)
def test_the_facts_come_back_equal(info):
    message = info_pb2.ModelInfo.FromString(model_info_to_proto(info).SerializeToString())
    assert model_info_from_proto(message) == info


def test_a_server_that_does_not_say_how_long_a_prompt_may_be_takes_the_model_s_limit():
    message = model_info_to_proto(replace(FAKE_MODEL, max_prompt_tokens=FAKE_MODEL.max_model_len - 1))
    assert message.max_prompt_tokens == FAKE_MODEL.max_model_len - 1
    message.ClearField("max_prompt_tokens")
    assert model_info_from_proto(message) == FAKE_MODEL


def test_every_service_of_the_contract_is_there():
    files = (generation_pb2, steering_pb2, capture_pb2, tokenizer_pb2, info_pb2)
    names = {name for file in files for name in file.DESCRIPTOR.services_by_name}
    assert names == {"GenerationService", "VectorService", "CaptureService", "TokenizerService", "InfoService"}


PROOF = StartProof(
    device="NVIDIA H200",
    seconds=2.5,
    kernel_rows=192,
    kernel_error=0.25,
    step_classes=("full graph of 8 rows", "without graphs of 17 rows"),
    is_exact=True,
    staging_bytes=3 << 20,
    pinned_bytes=4 << 20,
)


def test_a_proof_comes_back_equal():
    assert start_proof_from_proto(start_proof_to_proto(PROOF)) == PROOF


def test_the_proof_of_an_engine_is_that_of_all_its_workers():
    other = replace(PROOF, seconds=3.0, kernel_error=0.5, step_classes=("piecewise graphs of 16 rows",), is_exact=False)

    whole = StartProof.of_all([PROOF, other])

    assert (whole.seconds, whole.kernel_rows, whole.kernel_error, whole.is_exact) == (3.0, 384, 0.5, False)
    assert whole.step_classes == (*PROOF.step_classes, *other.step_classes)
    assert "3 MiB of the device and 4 MiB pinned" in str(whole)
    assert StartProof.of_all([]) is None
