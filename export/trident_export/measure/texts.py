"""Whether the text side of a causal model's artefacts is Hugging Face's: tokens, texts, prompts, ends and defaults.

The reference is transformers' own tokenizer, chat template and `generate`, read from the model's folder; what is
compared is what the runtime reads from the version folder. Nothing here needs a graph: the runtime chooses tokens from
Hugging Face's own logits, so a quantized variant's defaults are compared as strictly as a float32 one's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer

from trident_export.errors import FidelityError, UnreadableSource
from trident_export.huggingface.chat_templates import CONVERSATIONS
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_serving.chat.messages import Conversation, Message
from trident_serving.chat.origins import Traced, plain
from trident_serving.chat.template import ChatTemplate
from trident_serving.errors import InvalidRequest
from trident_serving.generation.request import RequestParser
from trident_serving.generation.text_service import read_eos_token_ids
from trident_serving.runtime.control_tokens import ControlTokens
from trident_serving.runtime.detokenizer import Detokenizer
from trident_serving.runtime.sampling.candidates import Candidates
from trident_serving.runtime.sampling.defaults import GenerationDefaults
from trident_serving.runtime.sampling.params import SamplingParams
from trident_serving.runtime.sampling.processors import filters, penalties
from trident_serving.runtime.sampling.sampler import Sampler
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.limits import CausalLimits

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

_UNFINISHED = "\ufffd"
# Texts that are compared besides the corpora's: what a tokenizer may strip, join, normalize or not know.
EDGES = (
    "Hello, world!",
    " one leading space",
    "   three leading spaces and two behind  ",
    "\n\nlines\r\n\ttabs\n",
    "x  =  [1,2,3]  # two   spaces",
    "it 's , isn't ? Yes !",
    "naïve café, Straße, İstanbul, ﬁne",
    "e\u0301a\u0308 combined, \u00a0no-break\u200bzero width",
    "中文，日本語、한국어 ไทย",
    "مرحبا بالعالم שלום नमस्ते",
    "😀🚀 👩‍👩‍👧‍👦 🇫🇷 1234567890 3.14",
    "<s>text</s> <|im_end|> [INST] <unk> >>deu<<",
)
CORPUS_TEXTS, CORPUS_CHARACTERS = 12, 200
# Answers of `generate` that are compared, and their tokens and those of their prompts.
ANSWERS, ANSWER_TOKENS, PROMPT_CHARACTERS = 4, 16, 60
CHANCES = 1e-3  # a token's chance may be off by; float32, and a token that is as likely as the last one kept

# Settings of a generation config that the runtime does not apply, with the values that are no settings.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "max_new_tokens": (None,),
    "stop_strings": (None,),
    "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1, 1.0),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "watermarking_config": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "token_healing": (None, False),
    "encoder_repetition_penalty": (None, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
}
# Of a config that samples, too.
_SAMPLING_NOT_APPLIED = ("top_h", "epsilon_cutoff", "eta_cutoff")


def not_applied(config: GenerationConfig) -> list[str]:
    """Settings of a generation config that a request which is silent does not get."""
    found = [name for name, harmless in _NOT_APPLIED.items() if getattr(config, name, None) not in harmless]
    if config.do_sample:
        found += [name for name in _SAMPLING_NOT_APPLIED if getattr(config, name, None)]
    return found


def check(
    source: HuggingFaceFolder, model: PreTrainedModel, folder: Path, limits: CausalLimits, texts: Sequence[str]
) -> None:
    """Compare all of it.

    Args:
        model: Hugging Face's, whole.
        folder: a version folder.
        texts: of the corpora, some of which are compared.

    Raises:
        FidelityError: something is otherwise than Hugging Face has it.
    """
    served = TextTokenizer.load(folder)
    samples = [*EDGES, *(text[:CORPUS_CHARACTERS] for text in texts[:: max(1, len(texts) // CORPUS_TEXTS)])]
    check_tokens(source.tokenizer, served, samples)
    check_chats(source.tokenizer, served, folder)
    check_generation(
        source, model, folder, limits, [text[:PROMPT_CHARACTERS] for text in samples[:: 1 + 20 // ANSWERS]]
    )


def check_file(source: HuggingFaceFolder, texts: Sequence[str] = EDGES) -> None:
    """Whether transformers reads the folder's tokenizer.json as it is written; it rebuilds some kinds of tokenizers.

    Raises:
        UnreadableSource: it gives other tokens.
    """
    import transformers

    file = source.path / "tokenizer.json"
    if not file.exists():
        return
    read, written = source.tokenizer, Tokenizer.from_file(str(file))
    written.no_truncation()  # transformers sets both anew at each call
    written.no_padding()
    for text in texts:
        found = read(text, add_special_tokens=False).input_ids
        if found != written.encode(text, add_special_tokens=False).ids:
            raise UnreadableSource(
                f"{source}: transformers {transformers.__version__} gives other tokens for {text!r} than the folder's "
                "tokenizer.json: save the tokenizer again by the version that wrote it, or take another model"
            )


def check_tokens(tokenizer: Any, served: TextTokenizer, texts: Sequence[str]) -> None:
    """Texts to tokens and back, and an answer behind its prompt, against the tokenizer of the folder.

    Raises:
        FidelityError: one is otherwise.
    """
    for text in texts:
        for special in (True, False):
            ids = tokenizer(text, add_special_tokens=special).input_ids
            if (found := served.encode(text, add_special_tokens=special)) != ids:
                raise FidelityError(
                    f"the served tokenizer gives {_differing(found, ids)} for {text!r} as Hugging Face's does not"
                )
        whole, middle = tokenizer.decode(ids, skip_special_tokens=True), len(ids) // 2
        if (shown := served.decode(ids)) != whole:
            raise FidelityError(f"the served tokenizer writes {shown!r} where Hugging Face's writes {whole!r}")
        known = tokenizer.decode(ids[:middle], skip_special_tokens=True)
        detokenizer = Detokenizer(served, ids[:middle])
        answer = "".join([*(detokenizer.push(token) for token in ids[middle:]), detokenizer.flush()])
        if answer != whole[len(known) :] and _UNFINISHED not in known + whole:
            raise FidelityError(
                f"an answer reads {answer!r} behind the prompt {known!r}, Hugging Face shows {whole[len(known) :]!r}"
            )


def check_chats(tokenizer: Any, served: TextTokenizer, folder: Path) -> None:
    """Prompts of the chat template against `apply_chat_template`: the same text, tokens and refusals.

    Args:
        folder: a version folder.

    Raises:
        FidelityError: one is otherwise.
    """
    template = ChatTemplate.load(folder)
    if template is None:
        if tokenizer.chat_template is not None:
            raise FidelityError("the model has a chat template, and the artefacts have none")
        return
    control = ControlTokens.load(folder, served, template.literals)
    for conversation in _conversations(template):
        for attempt in range(2):  # a template may write the time
            expected = _prompt_of(tokenizer, template.shaped(conversation))
            try:
                found: Traced | None = template.render(conversation)
            except InvalidRequest:
                found = None
            if found == expected or attempt:
                break
        if found != expected:
            raise FidelityError(
                f"the chat template makes {found!r} of {json.dumps(conversation.messages, ensure_ascii=False)}, "
                f"Hugging Face's apply_chat_template makes {expected!r}"
            )
        if found is not None:
            ids = tokenizer(plain(found), add_special_tokens=False).input_ids
            marked = any(token in text for token in control.ids for text in conversation.texts)
            own = served.encode(found, add_special_tokens=False) if marked else control.encode(found)
            if own != ids:
                raise FidelityError(
                    f"the prompt {found!r} has the tokens {_differing(own, ids)}, unlike Hugging Face's"
                )


def _conversations(template: ChatTemplate) -> Iterator[Conversation]:
    """What is compared: texts, and a call of a tool, where the template knows tools."""
    for conversation in CONVERSATIONS:
        yield Conversation([{"role": role, "content": content} for role, content in conversation])
    if "tools" in template.variables:
        schema = {"type": "object", "properties": {"city": {"type": "string", "description": "Its name"}}}
        function = {"name": "weather", "description": "The weather of a city", "parameters": schema}
        call = {"name": "weather", "arguments": {"city": "Zürich"}}
        user: Message = {"role": "user", "content": "Is it warm?"}
        called: Message = {"role": "assistant", "content": "", "tool_calls": [{"id": "call00001", "function": call}]}
        result: Message = {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "18"}
        for messages in ([user], [user, called, result]):
            yield Conversation(messages, tools=[{"type": "function", "function": function}])


def _prompt_of(tokenizer: Any, conversation: Conversation) -> str | None:
    """Hugging Face's prompt; None where the template refuses the messages."""
    tools = None if conversation.tools is None else list(conversation.tools)
    try:
        prompt: str = tokenizer.apply_chat_template(
            list(conversation.messages), tools=tools, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template's expressions raise whatever Python's operators raise
        return None
    return prompt


def check_generation(
    source: HuggingFaceFolder, model: PreTrainedModel, folder: Path, limits: CausalLimits, texts: Sequence[str]
) -> None:
    """Ends and defaults: a request that is silent, token for token against `generate` with the folder's settings.

    What the export says is not applied (`not_applied`) is left out there too.

    Raises:
        FidelityError: the runtime would take another token, or end elsewhere.
    """
    config = model.generation_config
    wanted, ends = _ids(config.eos_token_id), read_eos_token_ids(folder)
    if wanted != ends:
        raise FidelityError(f"answers end at the tokens {sorted(ends)}, Hugging Face's at {sorted(wanted)}")
    served = TextTokenizer.load(folder)
    defaults = GenerationDefaults.load(folder)
    parser = RequestParser(served, None, limits, defaults)
    for text in texts[:ANSWERS]:
        try:
            request = parser.parse({"text_input": np.array([[text.encode()]], np.object_)})
        except InvalidRequest:
            continue  # longer than a small context
        length = min(ANSWER_TOKENS, request.sampling.max_tokens)
        tokens, logits = _generated(model, request.prompt_ids, length)
        sampled = dataclasses.replace(
            request.sampling, max_tokens=length, min_tokens=min(request.sampling.min_tokens, length)
        )
        if not sampled.greedy:
            _check_chances(model, request.prompt_ids, sampled, ends)
        params = dataclasses.replace(sampled, temperature=0.0)
        sampler = Sampler.causal(params, request.prompt_ids, ends)
        found: list[int] = []
        for scores in logits:
            found.append(sampler.choose(scores))
            if found[-1] in ends:
                break
        if found != tokens:
            raise FidelityError(
                f"behind {text!r} the model's generation config lets the runtime choose "
                f"{_differing(found, tokens)} of Hugging Face's logits, as its own generate does not"
            )


def _check_chances(model: PreTrainedModel, prompt: Sequence[int], params: SamplingParams, ends: frozenset[int]) -> None:
    """Each token's chance to be drawn, against `generate`, behind an answer that it draws.

    Raises:
        FidelityError: some token has another chance.
    """
    torch.manual_seed(0)
    given = _generate(model, prompt, params.max_tokens, do_sample=True, output_scores=True)
    processors = [*penalties(params, len(prompt), ends), *filters(params)]
    for index, (logits, scores) in enumerate(zip(given.logits, given.scores, strict=True)):
        expected = torch.softmax(scores[0].double(), -1).numpy()
        candidates = Candidates(logits[0].float().numpy())
        for process in processors:
            process(given.sequences[0, : len(prompt) + index].numpy(), candidates)
        found = np.zeros_like(expected)
        found[slice(None) if candidates.ids is None else candidates.ids] = candidates.weights / candidates.weights.sum()
        if (largest := float(np.abs(found - expected).max())) > CHANCES:
            raise FidelityError(
                f"the model's generation config samples, and the chance of a token is {largest:.4f} off Hugging Face's"
            )


def _generated(model: PreTrainedModel, prompt: Sequence[int], length: int) -> tuple[list[int], list[Any]]:
    """Greedy tokens of Hugging Face's `generate`, and the logits that it chose each of."""
    given = _generate(model, prompt, length, do_sample=False)
    tokens: list[int] = given.sequences[0, len(prompt) :].tolist()
    return tokens, [scores[0].float().numpy() for scores in given.logits]


def _generate(model: PreTrainedModel, prompt: Sequence[int], length: int, **options: bool) -> Any:
    off: dict[str, Any] = {name: harmless[-1] for name, harmless in _NOT_APPLIED.items() if name != "max_new_tokens"}
    off |= dict.fromkeys(_SAMPLING_NOT_APPLIED)
    return model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        **{name: value for name, value in off.items() if getattr(model.generation_config, name, None) != value},
        max_new_tokens=length,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def _ids(value: int | list[int] | None) -> frozenset[int]:
    return frozenset(value if isinstance(value, list) else [] if value is None else [value])


def _differing(found: Sequence[int], expected: Sequence[int]) -> str:
    """The tokens from the first that differs on, a few."""
    same = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
    start = min(len(found), len(expected)) if same is None else same
    return f"{list(found[start : start + 4])} in place of {list(expected[start : start + 4])} from token {start} on"
