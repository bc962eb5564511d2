"""A chat template and its arguments that are chosen with a model of transformers."""

import copy
from pathlib import Path
from typing import Any

import pytest

from steer_service.core.errors import InvalidRequest, Unsupported
from steer_service.core.prompt import ChatMessage, ChatPrompt
from steer_service.core.sampling_options import SamplingOptions
from steer_service.directions.targets import Target
from steer_service.directions.training import target_tokens
from steer_service.hf.model import HFSteeringModel

TEMPLATE = "{% for m in messages %}{{ mood | default('plain') + ' ' + m.content }}{% endfor %}"
CHAT = ChatPrompt(messages=[ChatMessage(role="user", content="Hello")])


class WithoutTemplates:
    """A tokenizer that writes chats itself, as Mistral's does."""

    def __init__(self, tokenizer: Any) -> None:
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.all_special_ids = tokenizer.all_special_ids

    def apply_chat_template(self, *_: object, **__: object) -> list[int]:
        pytest.fail("a chat was written without the template")


async def prompt_of(model: HFSteeringModel, prompt: ChatPrompt = CHAT) -> str:
    [generation], _ = await model.generate([prompt], SamplingOptions(max_tokens=1), raw_output=True)
    return model.tokenizer.decode(generation.prompt_token_ids)


@pytest.mark.parametrize("is_file", [True, False])
async def test_a_template_and_its_arguments_hold_for_all_chats(
    hf: HFSteeringModel, tmp_path: Path, is_file: bool
) -> None:
    (tmp_path / "x.jinja").write_text(TEMPLATE, encoding="utf-8")
    template = str(tmp_path / "x.jinja") if is_file else TEMPLATE
    with HFSteeringModel(
        hf.model, tokenizer=hf.tokenizer, chat_template=template, default_chat_template_kwargs={"mood": "happy"}
    ) as model:
        own = ChatPrompt(messages=CHAT.messages, chat_template_kwargs={"mood": "sad"})

        assert await prompt_of(model) == "happy Hello"
        assert await prompt_of(model, own) == "sad Hello"
        assert (await model.render(CHAT)).text == "happy Hello"
        [trained] = target_tokens(model, [Target(prompt=CHAT, text=" there")])
        assert model.tokenizer.decode(trained.prompt) == "happy Hello"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"chat_template": "nowhere.jinja"}, "chat_template"),
        ({"default_chat_template_kwargs": {"tools": []}}, "default_chat_template_kwargs"),
        ({"default_chat_template_kwargs": "{"}, "default_chat_template_kwargs"),
    ],
)
def test_what_cannot_hold_is_refused_before_the_model_is_loaded(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        HFSteeringModel("no such model", **arguments)
    assert refused.value.field == field


async def test_the_facts_say_whether_chats_are_served(hf: HFSteeringModel) -> None:
    bare = copy.deepcopy(hf.tokenizer)
    bare.chat_template = None

    with HFSteeringModel(hf.model, tokenizer=bare) as model:
        assert not model.info.has_chat_template
        with pytest.raises(Unsupported, match="the model has no chat template; send text or token ids") as refused:
            await model.chat([{"role": "user", "content": "Hello"}], max_tokens=1)
        assert (refused.value.reason, refused.value.field) == ("NO_CHAT_TEMPLATE", "prompt.messages")
    with HFSteeringModel(hf.model, tokenizer=bare, chat_template=TEMPLATE) as model:
        assert model.info.has_chat_template
    with HFSteeringModel(hf.model, tokenizer=WithoutTemplates(hf.tokenizer)) as model:  # type: ignore[arg-type]
        assert model.info.has_chat_template
    assert hf.info.has_chat_template


async def test_a_tokenizer_without_templates_refuses_them(hf: HFSteeringModel) -> None:
    tokenizer: Any = WithoutTemplates(hf.tokenizer)
    with HFSteeringModel(hf.model, tokenizer=tokenizer, chat_template=TEMPLATE) as model:
        with pytest.raises(Unsupported, match="writes chats itself"):
            await model.chat([{"role": "user", "content": "Hello"}], max_tokens=1)
        with pytest.raises(Unsupported, match="writes chats itself"):
            target_tokens(model, [Target(prompt=CHAT, text="x")])
