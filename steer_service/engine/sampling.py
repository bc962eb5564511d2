"""Converts sampling options to vLLM's parameters, and vLLM's tokens to TokenDeltas.

vLLM detokenizes nothing: its detokenizer begins with the prompt, so that a character or a stop string which begins in
the prompt would count as generated.

Relies on (vLLM 0.24 to 0.33): `SamplingParams.detokenize`, with which neither the text of tokens nor that of
log-probabilities is looked up; `RequestOutput.prompt_logprobs`, which comes whole with the first token, even if the
prompt took several steps. tests/engine/test_seams.py notices a change.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

from vllm import SamplingParams
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from steer_service.core.events import PromptLogprobs, TokenDelta, TokenLogprob, TopLogprob
from steer_service.core.sampling_options import SamplingOptions
from steer_service.core.structured_outputs import StructuredOutputs
from steer_service.runtime.output_text import NewText
from steer_service.runtime.token_texts import TokenTexts, text_alone

LOGPROBS_AT_ONCE = 2048
"""Log-probabilities of a prompt that are converted before other tasks have their turn: a few milliseconds."""

NO_SEED = -1
"""A seed that vLLM ignores: the request would not be repeatable."""

INSTEAD_OF_NO_SEED = 2**63 - 1
"""The seed used instead of NO_SEED, chosen because a user is unlikely to choose it."""


def vllm_params(
    options: SamplingOptions,
    output_index: int,
    *,
    extra_args: dict[str, Any] | None,
    skip_cached: bool,
    stream_interval: int = 1,
) -> SamplingParams:
    """vLLM's parameters for one output; output i of a seeded request has seed + i, as in vLLM's own n > 1.

    `stream_interval`: tokens that vLLM hands out at a time, but the first; more than 1 needs HAS_STREAM_INTERVAL.
    The first output alone has the log-probabilities of the prompt, which must not read the prefix cache. If nothing is
    to be generated, vLLM generates one token, the cheapest, which the caller drops.
    """
    prompt_top = options.prompt_logprobs if output_index == 0 else None
    skip_cached = skip_cached or prompt_top is not None
    if options.is_rows_only:
        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            prompt_logprobs=prompt_top,
            detokenize=False,
            extra_args=extra_args,
            skip_reading_prefix_cache=skip_cached,
            output_kind=RequestOutputKind.DELTA,
        )
    return SamplingParams(
        n=1,
        max_tokens=options.max_tokens,
        min_tokens=options.min_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        seed=None if options.seed is None else _wrapped(options.seed + output_index),
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        repetition_penalty=options.repetition_penalty,
        ignore_eos=options.ignore_eos,
        logprobs=options.logprobs,
        prompt_logprobs=prompt_top,
        stop_token_ids=list(options.stop_token_ids),
        detokenize=False,  # runtime/output_text.py makes the text, and finds stop strings in it
        logit_bias=dict(options.logit_bias) or None,
        bad_words=list(options.bad_words),
        allowed_token_ids=list(options.allowed_token_ids) if options.allowed_token_ids is not None else None,
        structured_outputs=_structured(options.structured_outputs),
        extra_args=extra_args,
        skip_reading_prefix_cache=skip_cached,
        output_kind=RequestOutputKind.DELTA,
        **({"stream_interval": stream_interval} if stream_interval > 1 else {}),
    )


def _structured(constraint: StructuredOutputs | None) -> StructuredOutputsParams | None:
    if constraint is None:
        return None
    return StructuredOutputsParams(
        json=constraint.json,
        regex=constraint.regex,
        grammar=constraint.grammar,
        choice=list(constraint.choice) if constraint.choice is not None else None,
    )


def _wrapped(seed: int) -> int:
    wrapped = (seed + 2**63) % 2**64 - 2**63
    return wrapped if wrapped != NO_SEED else INSTEAD_OF_NO_SEED


def token_delta(
    index: int, completion: CompletionOutput, new: NewText, top: int | None, texts: TokenTexts
) -> TokenDelta:
    """The new tokens of output `index` with their text, and the `top` likeliest if log-probabilities were requested."""
    token_ids = tuple(completion.token_ids[: new.token_count])
    if completion.logprobs is None:
        return TokenDelta(output_index=index, text=new.text, token_ids=token_ids)
    entries = zip(token_ids, completion.logprobs, strict=False)
    text_of = partial(text_alone, texts)
    logprobs = tuple(_token_logprob(token, of_token, top or 0, text_of) for token, of_token in entries)
    return TokenDelta(output_index=index, text=new.text, token_ids=token_ids, logprobs=logprobs)


async def prompt_logprobs(
    token_ids: Sequence[int], entries: Sequence[Mapping[int, Logprob] | None], top: int | None, texts: TokenTexts
) -> PromptLogprobs:
    """The log-probabilities of the prompt `token_ids`. The first of vLLM's `entries` is None.

    There may be millions of them: other tasks of the event loop get their turn in between.
    """
    text_of = functools.cache(partial(text_alone, texts))
    pairs = [(token, of_token) for token, of_token in zip(token_ids, entries, strict=True) if of_token is not None]
    size = max(1, LOGPROBS_AT_ONCE // (1 + (top or 0)))
    logprobs: list[TokenLogprob] = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        logprobs += [_token_logprob(token, of_token, top or 0, text_of) for token, of_token in part]
        await asyncio.sleep(0)
    return PromptLogprobs(first_position=1, logprobs=tuple(logprobs))


def _token_logprob(token: int, entries: Mapping[int, Logprob], top: int, text_of: Callable[[int], str]) -> TokenLogprob:
    """The log-probability of `token` and the `top` likeliest, likeliest first."""
    ranked = [
        (entry.rank, other, entry.logprob) for other, entry in entries.items() if entry.rank and entry.rank <= top
    ]
    ranked.sort(key=itemgetter(0))
    return TokenLogprob(
        token_id=token,
        logprob=entries[token].logprob,
        top=tuple([TopLogprob(other, logprob, text_of(other), rank) for rank, other, logprob in ranked]),
        text=text_of(token),
        rank=entries[token].rank or 0,
    )
