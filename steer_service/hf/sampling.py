"""Chooses the next token of one output, with the options of vLLM and in its order.

V: vocabulary; T: tokens so far.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steer_service.core.checks import no_token_left
from steer_service.core.events import TokenLogprob, TopLogprob
from steer_service.runtime.prepare import PreparedRequest
from steer_service.runtime.token_texts import TokenTexts, text_alone

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy, as in vLLM."""

ROWS_AT_ONCE = 128
"""Positions whose log-probabilities are computed at once, which bounds the memory for them."""


class TokenChooser:
    """Chooses the tokens of one output, one at a time."""

    def __init__(
        self,
        prepared: PreparedRequest,
        output_index: int,
        ends: frozenset[int],
        bad_words: Sequence[tuple[int, ...]],
        texts: TokenTexts,
    ) -> None:
        """`ends` are the tokens that may not be chosen before `min_tokens`, `bad_words` the sequences never chosen."""
        options = prepared.options
        self._texts = texts
        self._bad_words = bad_words
        self._options = options
        self._prompt = list(prepared.prompt.token_ids)
        self._ends = sorted(ends)
        self._generator: torch.Generator | None = None
        if options.seed is not None:
            self._generator = torch.Generator().manual_seed((options.seed + output_index) % 2**64)

    def choose(self, logits_V: torch.Tensor, generated: Sequence[int]) -> TokenLogprob:
        """The next token after `generated`, with the log-probabilities that the options request.

        `logits_V` is float32 on the CPU. Log-probabilities are those before penalties and temperature, as in vLLM.
        """
        changed_V = self._penalised(logits_V, generated)
        if self._options.allowed_token_ids is not None and changed_V.max() == -torch.inf:
            raise no_token_left()
        assert self._options.temperature is not None
        if self._options.temperature < GREEDY_BELOW:
            token = int(changed_V.argmax())
        else:
            token = self._sampled(changed_V / self._options.temperature)
        return self._with_logprobs(token, logits_V)

    def _penalised(self, logits_V: torch.Tensor, generated: Sequence[int]) -> torch.Tensor:
        options, changed_V = self._options, logits_V.clone()
        if options.allowed_token_ids is not None:
            allowed = list(options.allowed_token_ids)
            changed_V.fill_(-torch.inf)
            changed_V[allowed] = logits_V[allowed]
        for *before, last in self._bad_words:
            if not before or list(generated[-len(before) :]) == before:
                changed_V[last] = -torch.inf
        for token, bias in options.logit_bias.items():
            changed_V[token] += bias
        assert options.min_tokens is not None
        if len(generated) < options.min_tokens and self._ends:
            changed_V[self._ends] = -torch.inf
        if options.repetition_penalty != 1.0:
            seen = torch.tensor([[*self._prompt, *generated]])
            changed_V = _applied(RepetitionPenaltyLogitsProcessor(options.repetition_penalty), changed_V, seen)
        if generated:
            counts_V = torch.bincount(torch.tensor(generated), minlength=len(changed_V)).to(changed_V)
            changed_V -= options.frequency_penalty * counts_V + options.presence_penalty * (counts_V > 0)
        return changed_V

    def _sampled(self, logits_V: torch.Tensor) -> int:
        options = self._options
        if options.min_p:
            logits_V = _applied(MinPLogitsWarper(options.min_p), logits_V)
        if options.top_k:
            logits_V = _applied(TopKLogitsWarper(options.top_k), logits_V)
        if options.top_p is not None and options.top_p < 1.0:
            logits_V = _applied(TopPLogitsWarper(options.top_p), logits_V)
        return int(torch.multinomial(logits_V.softmax(-1), 1, generator=self._generator))

    def _with_logprobs(self, token: int, logits_V: torch.Tensor) -> TokenLogprob:
        if self._options.logprobs is None:
            return TokenLogprob(token_id=token, logprob=0.0)
        (entry,) = token_logprobs(logits_V.unsqueeze(0), [token], self._options.logprobs, self._texts)
        return entry


def token_logprobs(
    logits_TV: torch.Tensor, tokens: Sequence[int], top: int, texts: TokenTexts
) -> Iterator[TokenLogprob]:
    """The log-probability of each of `tokens` at its row of the logits, and the `top` likeliest tokens there."""
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        chosen_T1 = torch.tensor(tokens[start : start + ROWS_AT_ONCE]).unsqueeze(1)
        logprobs_TV = logits_TV[start : start + ROWS_AT_ONCE].float().cpu().log_softmax(-1)
        logprobs_T1 = logprobs_TV.gather(1, chosen_T1)
        ranks_T = (logprobs_TV >= logprobs_T1).sum(1)
        values, likeliest = logprobs_TV.topk(top)
        for row, token in enumerate(chosen_T1.squeeze(1).tolist()):
            pairs = zip(likeliest[row].tolist(), values[row].tolist(), strict=True)
            yield TokenLogprob(
                token_id=token,
                logprob=float(logprobs_T1[row]),
                top=tuple(
                    TopLogprob(other, logprob, text_alone(texts, other), rank)
                    for rank, (other, logprob) in enumerate(pairs, 1)
                ),
                text=text_alone(texts, token),
                rank=int(ranks_T[row]),
            )


def _applied(processor: Any, logits_V: torch.Tensor, tokens_1T: torch.Tensor | None = None) -> torch.Tensor:
    return processor(tokens_1T, logits_V.unsqueeze(0)).squeeze(0)
