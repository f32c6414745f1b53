"""What a model needs for conversations: its chat template, its control tokens, and the format of its answers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from trident_serving.chat.messages import Conversation
from trident_serving.chat.template import ChatTemplate, special_tokens
from trident_serving.generation.parsing import FAMILIES, AnswerParser, forced_call, format_of, schemas_of
from trident_serving.runtime.control_tokens import ControlTokens
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.fields import ChatFormat
from trident_serving.schema.limits import CausalLimits


@dataclass(frozen=True)
class Chat:
    """The conversations of one model.

    Attributes:
        format: in which its answers hold reasoning and calls.
        end_token_ids: that end an assistant's turn, besides the ends of every answer.
    """

    template: ChatTemplate
    control: ControlTokens
    format: ChatFormat
    end_token_ids: frozenset[int] = frozenset()

    @classmethod
    def load(cls, folder: Path, tokenizer: TextTokenizer, limits: CausalLimits, literals: str = "") -> Chat | None:
        """Of a version folder; None where the model has no chat template.

        Args:
            literals: what else is written into prompts beside the template's own text.
        """
        template = ChatTemplate.load(folder, limits.chat_template_kwargs.values)
        if template is None:
            return None
        control = ControlTokens.load(folder, tokenizer, f"{template.literals}\0{literals}")
        # The tokenizer's end, and what the template writes behind an answer.
        ends = (control.ids.get(special_tokens(folder).get("eos_token", "")), control.first_of(template.end_of_turn))
        chosen = limits.chat_format if limits.chat_format != ChatFormat.AUTO else format_of(template.text)
        return cls(template, control, chosen, frozenset(token for token in ends if token is not None))

    @cached_property
    def marks(self) -> dict[int, str]:
        """Special tokens that are marks of the format, by their ids: no text of an answer shows them."""
        known = FAMILIES[self.format]().marks
        return {token: text for text, token in self.control.special.items() if text in known}

    def forced_grammar(self, conversation: Conversation, prompt: str) -> str | None:
        """The grammar, in Lark, of an answer that must be a call; None where it need not.

        Args:
            prompt: the rendered one. If it has opened the reasoning, the answer ends that first.
        """
        forced = forced_call(conversation, self.format)
        if forced is None:
            return None
        close = dict(FAMILIES[forced.format].thoughts).get(self._opened(forced.format, prompt))
        if close is not None:
            forced = replace(forced, prefix=f"{close}\n\n{forced.prefix}")
        return forced.lark(self.control.added)

    def parser(self, conversation: Conversation, prompt: str, *, reasoning: bool) -> AnswerParser | None:
        """What parts the answer to a conversation; None where all of it is text.

        Args:
            prompt: the rendered one, which may have opened the reasoning.
            reasoning: whether it is to come apart.
        """
        if not conversation.tools and not reasoning:
            return None
        forced = forced_call(conversation, self.format)
        chosen = forced.format if forced is not None else self.format
        return FAMILIES[chosen](
            schemas_of(conversation.tools or ()),
            calls=bool(conversation.tools),
            reasoning=reasoning,
            opened=self._opened(chosen, prompt),
            hidden=frozenset(self.marks.values()),
        )

    @staticmethod
    def _opened(chosen: ChatFormat, prompt: str) -> str:
        """The mark by which a prompt has opened the reasoning; "": it has not."""
        end = prompt.rstrip()
        return next((mark for mark, _ in FAMILIES[chosen].thoughts if end.endswith(mark)), "")
