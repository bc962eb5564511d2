"""What an engine does whose start chose it, all on one engine: priorities, names of the model, sampling defaults."""

import asyncio
import json
import shutil
from collections.abc import Iterator

import pytest

from steer_service.core.errors import NotFound, Unsupported
from steer_service.core.events import TokenDelta
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.engine import VLLMSteeringModel
from steer_service.hf import HFSteeringModel
from steer_service.runtime.calls import checked_events
from tests.engine.all_backends import AllBackends
from tests.engine.conftest import ENGINE_ARGUMENTS
from tests.tiny_models import ModelFolder

pytestmark = pytest.mark.engine

LIMIT_S = 120
PROMPT = TokenPrompt(token_ids=(5, 6, 7))


@pytest.fixture(scope="module")
def configured(model_folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMSteeringModel]:
    """An engine that runs one request at a time, by priority, under two names, with a generation config's defaults."""
    folder = tmp_path_factory.mktemp("configured") / "model"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "max_new_tokens": 3, "top_k": 7}))
    arguments = {
        **ENGINE_ARGUMENTS,
        "scheduling_policy": "priority",
        "max_num_seqs": 1,
        "served_model_name": ["mine", "alias", "mine"],
        "generation_config": "auto",
        "default_chat_template_kwargs": {"enable_thinking": True},
    }
    with VLLMSteeringModel(str(folder), **arguments) as model:
        yield model


async def test_chats_have_the_arguments_chosen_at_the_start_on_all_backends(
    configured: VLLMSteeringModel, model_folder: ModelFolder
) -> None:
    messages = [{"role": "user", "content": "Where is the harbour?"}]
    kwargs = {"enable_thinking": True}
    with (
        HFSteeringModel(model_folder("llama"), default_chat_template_kwargs=kwargs) as hf,
        HFSteeringModel(model_folder("llama")) as bare,
    ):
        async with AllBackends(hf, configured).backends() as backends:
            for name, backend in backends.items():
                options = {"max_tokens": 0, "raw_output": True, "timeout_s": LIMIT_S}
                [chosen] = (await backend.chat(messages, **options)).generations
                [other] = (
                    await backend.chat(messages, chat_template_kwargs={"enable_thinking": False}, **options)
                ).generations
                assert chosen.prompt_token_ids == (await bare.render(messages, chat_template_kwargs=kwargs)).token_ids
                assert other.prompt_token_ids == (await bare.render(messages)).token_ids, name
                assert other.prompt_token_ids != chosen.prompt_token_ids, name


def ask(priority: int | None, tokens: int = 4) -> GenerateRequest:
    sampling = SamplingOptions(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(prompt=PROMPT, sampling=sampling, priority=priority)


async def test_an_engine_without_the_policy_refuses_a_priority(llama: VLLMSteeringModel) -> None:
    assert not llama.has_priority
    with pytest.raises(Unsupported) as refused:
        await llama.complete(ask(0))
    assert (refused.value.field, refused.value.reason) == ("priority", "NO_PRIORITY")


async def test_of_waiting_requests_those_with_lower_values_run_first(configured: VLLMSteeringModel) -> None:
    order: list[int | None] = []

    async def run(request: GenerateRequest, first: asyncio.Event) -> None:
        async for event in checked_events(configured, request):
            if isinstance(event, TokenDelta):
                first.set()
        order.append(request.priority)

    async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as tasks:
        running = asyncio.Event()
        tasks.create_task(run(ask(-9, tokens=400), running))
        await running.wait()
        for priority in (5, 0, None, -4):
            tasks.create_task(run(ask(priority), asyncio.Event()))

    assert order[:2] == [-9, -4]
    assert order[-1] == 5


async def test_a_model_is_served_under_each_of_its_names(configured: VLLMSteeringModel) -> None:
    assert (configured.info.name, configured.info.aliases) == ("mine", ("alias",))
    for name in ("", "mine", "alias"):
        await configured.complete(GenerateRequest(prompt=PROMPT, model=name))
    with pytest.raises(NotFound):
        await configured.complete(GenerateRequest(prompt=PROMPT, model="other"))


async def test_what_a_request_leaves_open_comes_from_the_generation_config(configured: VLLMSteeringModel) -> None:
    [generation], _ = await configured.generate([PROMPT], ignore_eos=True, raw_output=True)
    assert generation.generation_config == "model"
    sampling = generation.sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.top_k) == (0.25, 3, 7)

    [asked], _ = await configured.generate([PROMPT], max_tokens=2, temperature=0.0, raw_output=True)
    assert (asked.sampling.temperature, asked.sampling.max_tokens, asked.sampling.top_k) == (0.0, 2, 7)
