"""What a generation config forbids or forces, for the search of one answer."""

from __future__ import annotations

from dataclasses import dataclass

from trident_serving.runtime.sampling.processors import (
    BadWords,
    ForcedTokens,
    LogitsProcessor,
    MinLength,
    NoRepeatNGram,
    RepetitionPenalty,
    SuppressTokens,
)


@dataclass(frozen=True)
class Rules:
    """The rules of one request; sequences include the decoder's start tokens.

    Attributes:
        max_length: of a sequence, start tokens included.
        min_length: before it, no sequence ends.
        prompt_length: start tokens; `min_new_tokens` counts from behind them.
        repetition_penalty: divides the score of tokens that are there already, or multiplies a negative one.
        no_repeat_ngram_size: no n-gram of this size comes twice; 0: off.
        bad_words: sequences of tokens that never appear.
        forced_bos_token_id: the first token behind a single start token.
        forced_eos_token_id: the last token of a sequence of `max_length`.
        suppress_tokens: never appear; `begin_suppress_tokens` not as the first.
        more: a task's own, behind all others.
    """

    max_length: int
    min_length: int = 0
    min_new_tokens: int = 0
    prompt_length: int = 1
    eos_token_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_ids: tuple[int, ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    more: tuple[LogitsProcessor, ...] = ()

    def processors(self) -> list[LogitsProcessor]:
        """In the order of transformers' `_get_logits_processor`; nothing for a rule that is off.

        Beam search applies them to log-probabilities, greedy search and sampling to logits, as there.
        """
        found: list[LogitsProcessor] = []
        if self.repetition_penalty != 1.0:
            found.append(RepetitionPenalty(self.repetition_penalty))
        if self.no_repeat_ngram_size:
            found.append(NoRepeatNGram(self.no_repeat_ngram_size))
        if self.bad_words:
            found.append(BadWords(self.bad_words))
        min_length = max(self.min_length, self.prompt_length + self.min_new_tokens)
        if min_length > self.prompt_length:
            found.append(MinLength(min_length, self.eos_token_ids))
        first = 1
        if self.forced_bos_token_id is not None:
            found.append(ForcedTokens(1, (self.forced_bos_token_id,)))
            first = 2
        if self.forced_eos_token_ids:
            found.append(ForcedTokens(self.max_length - 1, self.forced_eos_token_ids))
        if self.suppress_tokens:
            found.append(SuppressTokens(self.suppress_tokens))
        if self.begin_suppress_tokens:
            found.append(SuppressTokens(self.begin_suppress_tokens, max(self.prompt_length, first)))
        return [*found, *self.more]
