"""Models of odd sizes and their tokenizers, and random requests that look valid."""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steer_service.core.backend import ModelInfo
from steer_service.core.capture import CaptureSite, CaptureSpec
from steer_service.core.positions import PositionRange
from steer_service.core.prompt import ChatMessage, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.specs import AblationSpec, AddSpec, LayerSteeringSpec, ProjectionCapSpec, SteeringSpec

CORPUS = ["the three of them met at the harbour before sunrise", "視𠜎 é 🙂 abc ABC 123"] * 4
TEMPLATE = "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"


@dataclass(frozen=True)
class OddModel:
    """A model and the engine arguments with which it is odd."""

    make: Callable[[], tuple[Any, Tokenizer]]
    arguments: dict[str, Any]

    def save(self, folder: Path) -> None:
        torch.manual_seed(0)
        model, tokenizer = self.make()
        model.save_pretrained(folder)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE)
        fast.save_pretrained(folder)


def llama(vocab_size: int, *, layers: int = 2, width: int = 64, length: int = 256) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=1 if width % 2 else 2,  # their number must divide the width
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=length,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).float()


def gpt2(vocab_size: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=24, n_embd=64, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).float()


def byte_level(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<eos>")])
    return tokenizer


def metaspace(pieces: str) -> Tokenizer:
    vocabulary = [("<eos>", 0.0), ("<unk>", 0.0), *((piece, -1.0 - index) for index, piece in enumerate(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("<eos>")])
    return tokenizer


ODD_MODELS = {
    "twelve ids, ten tokens, one layer": OddModel(
        lambda: (llama(12, layers=1), metaspace("▁abcdefg")), {"max_logprobs": 1000}
    ),
    "more ids than the tokenizer": OddModel(lambda: (llama(200), metaspace("▁" + string.ascii_letters)), {}),
    "more tokens than the model": OddModel(lambda: (llama(270), byte_level(330)), {"max_logprobs": -1}),
    "an odd hidden size": OddModel(lambda: (llama(300, width=33), byte_level(290)), {"max_logprobs": 3}),
    "a maximum length of eleven": OddModel(lambda: (gpt2(331), byte_level(330)), {"max_model_len": 11}),
}


class RandomRequests:
    """Requests that a client might send, from a seed. Most are valid; some are outside a limit by little."""

    def __init__(self, info: ModelInfo, seed: int) -> None:
        self.info = info
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)

    def next(self) -> GenerateRequest | None:
        """A request; None if the numbers drawn are refused when it is constructed."""
        try:
            return GenerateRequest(
                prompt=self.prompt(),
                sampling=self.sampling(),
                steering=self.steering() if self.random.random() < 0.5 else None,
                capture=self.capture() if self.random.random() < 0.4 else None,
            )
        except ValueError:
            return None

    def count(self, most: int, least: int = 0) -> int:
        """A whole number of a range, most often at its ends and now and then beside them."""
        near = [least, least + 1, most - 1, most, most + 1, self.random.randint(least, max(least, most))]
        return self.random.choice([*near, *(self.random.randint(least, max(least, most)) for _ in range(6))])

    def token(self) -> int:
        return max(
            0,
            self.random.choice(
                [self.count(self.info.vocab_size - 1)] + [self.random.randrange(self.info.vocab_size)] * 30
            ),
        )

    def text(self) -> str:
        alphabet = self.random.choice(["abc ", string.printable, "視𠜎é🙂\u0301 a", " ", "xyz<eos>"])
        return "".join(self.random.choices(alphabet, k=self.random.choice([1, 2, 5, 20, 60, 400])))

    def prompt(self) -> Prompt:
        match self.random.randrange(4):
            case 0:
                return TextPrompt(text=self.text())
            case 1:
                turns = self.random.randint(1, 4)
                return ChatPrompt(messages=[ChatMessage(role="user", content=self.text()) for _ in range(turns)])
            case _:
                length = self.random.choice([1, 2, 5, self.count(self.info.max_model_len, 1)])
                return TokenPrompt(token_ids=[self.token() for _ in range(length)])

    def sampling(self) -> SamplingOptions:
        info, draw = self.info, self.random
        options = {
            "n": lambda: draw.choice([1, 1, 2, 3, 8]),
            "max_tokens": lambda: draw.choice([1, 2, 5, 8, 12, info.max_model_len, 2**31 - 1]),
            "min_tokens": lambda: draw.choice([0, 1, 2, 5, info.max_model_len]),
            "temperature": lambda: draw.choice([0.0, 1e-6, 0.005, 0.5, 1.0, 2.0, 2.5]),
            "top_p": lambda: draw.choice([1e-9, 0.1, 0.9, 1.0]),
            "top_k": lambda: draw.choice([0, 1, self.count(info.vocab_size), 2**31 - 1]),
            "min_p": lambda: draw.choice([0.0, 0.1, 1.0]),
            "seed": lambda: draw.choice([0, 1, -1, -(2**63), 2**63 - 1]),
            "presence_penalty": lambda: draw.choice([-2.0, 0.5, 2.0]),
            "frequency_penalty": lambda: draw.choice([-2.0, 0.5, 2.0]),
            "repetition_penalty": lambda: draw.choice([1e-300, 1e-30, 0.5, 1.1, 2.0]),
            "ignore_eos": lambda: draw.choice([True, False]),
            "skip_special_tokens": lambda: draw.choice([True, False]),
            "include_stop": lambda: draw.choice([True, False]),
            "logprobs": lambda: draw.choice([0, 1, self.count(20), min(20, info.vocab_size + 1)]),
            "stop": lambda: tuple(self.text()[:4] or "a" for _ in range(draw.randint(1, 3))),
            "stop_token_ids": lambda: draw.choice(
                [[self.token()], list(range(min(128, info.vocab_size))), [info.vocab_size - 1]]
            ),
            "logit_bias": lambda: {self.token(): draw.choice([-100.0, 0.5, 100.0]) for _ in range(draw.randint(1, 12))},
        }
        chosen = {name: make() for name, make in options.items() if draw.random() < 0.3}
        return SamplingOptions(**{"max_tokens": draw.choice([1, 3, 6]), **chosen})

    def vector(self) -> np.ndarray:
        size = self.info.hidden_size + self.random.choice([0] * 20 + [-1, 1])
        scale = self.random.choice([1e-30, 1.0, 1.0, 1.0, 1e4, 1e18, 1e37])
        return (self.numbers.normal(size=size) * scale).astype(np.float32)

    def steering(self) -> SteeringSpec:
        draw = self.random
        operations = (
            lambda: AddSpec(self.vector(), draw.choice([0.0, 1.0, -3.0, 1e20])),
            lambda: ProjectionCapSpec(self.vector(), min=-1.0, max=draw.choice([0.0, 1.0, 1e30])),
            lambda: AblationSpec(self.vector(), draw.choice([0.0, 1.0, -1.0, 1e10])),
        )
        layers = {self.count(self.info.layer_count - 1) for _ in range(draw.randint(1, 2))}
        spec = {
            max(0, layer): LayerSteeringSpec([draw.choice(operations)() for _ in range(draw.choice([1, 1, 2, 5]))])
            for layer in layers
        }
        return SteeringSpec(spec, positions=self.positions())

    def positions(self) -> Any:
        return self.random.choice(
            [
                None,
                None,
                "prompt",
                "generated",
                -1,
                0,
                PositionRange(0, self.count(12, 1)),
                [0, PositionRange(-2, None)],
            ]
        )

    def capture(self) -> CaptureSpec:
        draw = self.random
        layers = {max(0, self.count(self.info.layer_count - 1)) for _ in range(draw.randint(0, 3))}
        return CaptureSpec(
            layers=tuple(layers),
            site=draw.choice(list(CaptureSite)),
            positions=self.positions(),
            is_live=draw.choice([True, False]),
        )
