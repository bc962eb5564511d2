"""A served model for lm-eval, EleutherAI's harness, with steering: `--model steerllm`.

lm-eval has no entry points for models. A program imports this module, which registers the class. On the command line,
`python -m steer_client.lm_eval_model` is `lm-eval` with the class registered. It needs the extra `lm-eval`.

It relies on lm_eval 0.4.13: on TemplateLM, which splits a context and its continuation into tokens, and on the
rules for generation in `lm_eval.models.utils`. `tests/client/test_lm_eval_model.py` compares it with lm-eval's `hf`.
"""

import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from steer_client.aio import AsyncSteerClient
from steer_service.core.errors import InvalidRequest
from steer_service.core.prompt import TokenPrompt
from steer_service.core.request import GenerateRequest
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.scaled_spec import scaled_spec
from steer_service.core.specs import SteeringSpec
from steer_service.formats.checkpoint import load_spec
from steer_service.formats.spec_json import spec_from_json, spec_from_text
from steer_service.runtime.event_loop_thread import EventLoopThread
from steer_service.runtime.scoring import after_prompt
from steer_service.runtime.together import together
from steer_service.wire.channels import DEFAULT_ADDRESS, tls_credentials

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from transformers import AutoTokenizer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}; run: pip install '.[lm-eval]' in a checkout", name=error.name) from error

Given = TypeVar("Given")
Result = TypeVar("Result")

Pair = tuple[Any, list[int], list[int]]
"""A request of lm-eval (None for a window of a longer text), and the tokens of its context and its continuation."""

SCORE = SamplingOptions(max_tokens=0, prompt_logprobs=1)
"""The likeliest token at each position says whether the model would have chosen the continuation."""

TOKENIZER_SAMPLE = "The sea is 12 km wide.\n\tÜber naïve co-op, 東京: f(x) = x**2;"
"""A text that two tokenizers hardly split alike unless they are the same."""

GENERATION_OPTIONS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "min_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
"""Generation arguments of a task that are passed on, beside `until`, `do_sample` and `max_gen_toks`."""


@register_model("steerllm")
class SteerLM(TemplateLM):
    """A model behind `steer serve`, steered alike in every request, with the tokens and numbers of lm-eval's `hf`.

    `tokenizer` is the name or folder of the served model's tokenizer, for transformers; by default the served name.
    `steering` is a SteeringSpec, its JSON form, a file with that, or a folder that `steer train` wrote. `scale`
    multiplies the scale of each addition. Positions such as "generated" are those that the continuation has when the
    model generates it. `model` names an adapter. `concurrency` is the number of requests in flight; lm-eval's
    `batch_size`, `max_batch_size` and `device` have no effect, since the server makes its own batches.
    `max_length` is the number of tokens before the last one; by default the server's limit less one.

    Raises a SteerError: UNREACHABLE without a server, and InvalidRequest for options that do not fit the model.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        tokenizer: str | None = None,
        steering: SteeringSpec | Mapping[str, Any] | str | None = None,
        scale: float = 1.0,
        model: str = "",
        concurrency: int = 32,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        think_end_token: str | None = None,
        token: str = "",
        tls_ca: str | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        super().__init__()
        if concurrency < 1:
            raise InvalidRequest(f"{concurrency} requests in flight; expected at least 1", field="concurrency")
        self.steering = scaled(steering_from(steering), float(scale))
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self.chat_template_args = dict(chat_template_args or {})
        self.think_end_token = think_end_token
        self._model, self._concurrency, self._prefix_token_id = model, int(concurrency), prefix_token_id
        self._loop = EventLoopThread("steer-lm-eval")
        try:
            credentials = None if tls_ca is None else tls_credentials(ca=tls_ca)
            self._client = AsyncSteerClient(address, token=token, credentials=credentials)
            info = self._loop.run(self._client.load_info())
            # The server computes the last token too; `hf` only reads its row, so that the same window has one more.
            longest = info.max_prompt_tokens - 1
            self.max_length = longest if max_length is None else int(max_length)
            if not 1 <= self.max_length <= longest:
                raise InvalidRequest(f"max_length {self.max_length} is outside 1..{longest}", field="max_length")
            self.tokenizer = _load_tokenizer(tokenizer or info.name)
            self._check_tokenizer(tokenizer or info.name)
        except BaseException:
            self._loop.stop()
            raise

    def _check_tokenizer(self, name: str) -> None:
        served = self._loop.run(
            self._client.tokenize(
                TOKENIZER_SAMPLE, add_special_tokens=False, with_token_texts=False, with_offsets=False
            )
        )
        if tuple(self.tokenizer.encode(TOKENIZER_SAMPLE, add_special_tokens=False)) != served.token_ids:
            raise InvalidRequest(
                f"{name} splits text in other ways than the server; give the tokenizer of the served model",
                field="tokenizer",
            )

    def close(self) -> None:
        """Closes the connection; calling it again does nothing."""
        if not self._loop.is_stopped:
            self._loop.run(self._client.close())
            self._loop.stop()

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS, or the end of a text for tokenizers without BOS."""
        if self._prefix_token_id is not None:
            return int(self._prefix_token_id)
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.chat_template_args,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text; none are added to one that begins with the prefix token already, as a chat may."""
        if add_special_tokens is None:
            has_prefix = string.startswith(self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if has_prefix else self.add_bos_token
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, in windows of `max_length` that overlap as little as possible."""
        windows: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            of_text = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += of_text
            counts.append(len(of_text))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [math.fsum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        async def score(pair: Pair) -> tuple[float, bool]:
            asked, context, continuation = pair
            if not 0 < len(continuation) <= self.max_length:
                raise InvalidRequest(
                    f"a continuation has {len(continuation)} tokens; expected 1 to max_length, {self.max_length}",
                    field="requests",
                )
            tokens = (context + continuation)[-(self.max_length + 1) :]
            request = GenerateRequest(
                prompt=TokenPrompt(token_ids=tuple(tokens)),
                sampling=SCORE,
                steering=after_prompt(self.steering, len(tokens) - len(continuation)),
                model=self._model,
            )
            entries = (await self._client.complete(request)).prompt_logprobs[-len(continuation) :]
            chosen = [entry for entry in entries if entry is not None]
            is_greedy = all(entry.top[0].token_id == entry.token_id for entry in chosen)
            result = math.fsum(entry.logprob for entry in chosen), is_greedy
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, result)
            return result

        return self._of_each(score, requests, None if disable_tqdm else "loglikelihood")

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of the task's stop strings."""

        async def generate(asked: tuple[str, dict[str, Any]]) -> str:
            context, arguments = asked
            until, sampling = self._sampling_from(arguments)
            room = self.max_length - (sampling.max_tokens or 0)
            if room < 1:
                raise InvalidRequest(
                    f"max_gen_toks {sampling.max_tokens} leaves no room in max_length {self.max_length}",
                    field="max_gen_toks",
                )
            tokens = self.tok_encode(context)[-room:] or [self.prefix_token_id]
            request = GenerateRequest(
                prompt=TokenPrompt(token_ids=tuple(tokens)),
                sampling=sampling,
                steering=self.steering,
                model=self._model,
            )
            text = (await self._client.complete(request)).outputs[0].text
            text = postprocess_generated_text(text, until, self.think_end_token)
            self.cache_hook.add_partial("generate_until", asked, text)
            return str(text)

        asked = [request.args for request in requests]
        return self._of_each(generate, asked, None if disable_tqdm else "generate_until")

    def _sampling_from(self, arguments: Mapping[str, Any]) -> tuple[list[str], SamplingOptions]:
        """The stop strings and the options of a task's generation arguments; raises InvalidRequest for unknown ones."""
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments), self.max_gen_toks))
        until = [stop for stop in handle_stop_sequences(given.pop("until"), eos=None) if stop]
        most = given.pop("max_gen_toks")
        if not given.pop("do_sample"):
            given["temperature"] = 0.0
        unknown = sorted(set(given) - set(GENERATION_OPTIONS))
        if unknown:
            raise InvalidRequest(
                f"{', '.join(unknown)} is not an option here; there are {', '.join(GENERATION_OPTIONS)}",
                field="generation_kwargs",
            )
        # A stop string in the thoughts of a model that thinks does not end its answer.
        stop = () if self.think_end_token else tuple(until)
        return until, SamplingOptions(max_tokens=most, stop=stop, **given)

    def _of_each(
        self, run: Callable[[Given], Coroutine[Any, Any, Result]], given: Sequence[Given], title: str | None
    ) -> list[Result]:
        """The result of each, in order, with `concurrency` of them in flight; the first error ends all."""
        return self._loop.run(_gathered(run, given, self._concurrency, title))


async def _gathered(
    run: Callable[[Given], Coroutine[Any, Any, Result]], given: Sequence[Given], concurrency: int, title: str | None
) -> list[Result]:
    results: dict[int, Result] = {}
    waiting = iter(enumerate(given))
    with tqdm(total=len(given), desc=title, disable=title is None) as bar:

        async def work() -> None:
            for index, one in waiting:
                results[index] = await run(one)
                bar.update()

        await together(work() for _ in range(min(concurrency, len(given))))
    return [results[index] for index in range(len(given))]


def _load_tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"transformers finds no tokenizer {name}; give the name or the folder of the served model's",
            field="tokenizer",
        ) from error


def steering_from(given: SteeringSpec | Mapping[str, Any] | str | None) -> SteeringSpec | None:
    """A spec, its JSON form as a document or text, a file with it, or a folder of `steer train`; None: no steering."""
    if given is None or isinstance(given, SteeringSpec):
        return given
    if isinstance(given, Mapping):
        return spec_from_json(given)
    if given.lstrip().startswith("{"):
        return spec_from_text(given)
    path = Path(given)
    if path.is_dir():
        return load_spec(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"{given} is neither a JSON object nor a readable file or folder", field="steering"
        ) from error
    return spec_from_text(text, path.parent)


def scaled(spec: SteeringSpec | None, factor: float) -> SteeringSpec | None:
    """The spec with the scale of each addition times `factor`; raises InvalidRequest if it has other operations."""
    if spec is not None:
        return scaled_spec(spec, factor)
    if factor != 1.0:
        raise InvalidRequest("a scale needs steering", field="scale")
    return None


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
