"""Tokens of images, videos and sound in prompts, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from tests import tiny_models
from trident_serving.errors import InvalidRequest
from trident_serving.generation.chat import Chat
from trident_serving.generation.media import MediaTokens
from trident_serving.generation.request import RequestParser
from trident_serving.runtime.tokenizer import TextTokenizer
from trident_serving.schema.limits import GenerationLimits
from trident_serving.text import encode_texts

QWEN = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
IDS = {token: 512 + place for place, token in enumerate(QWEN)}
CONFIG: dict[str, Any] = {
    "vision_config": {"depth": 1},
    "image_token_id": IDS["<|image_pad|>"],
    "video_token_id": IDS["<|video_pad|>"],
    "vision_start_token_id": IDS["<|vision_start|>"],
    "vision_end_token_id": IDS["<|vision_end|>"],
    "bos_token_id": 0,
}


def _folder(folder: Path, config: dict[str, Any], marks: list[str], *, special: bool = True) -> Path:
    tokenizer = tiny_models.byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in marks])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _media(folder: Path) -> MediaTokens:
    return MediaTokens.load(folder, TextTokenizer.load(folder))


@pytest.mark.parametrize(
    ("config", "marks", "texts", "around"),
    [
        (CONFIG, QWEN, QWEN[1:], {"<|vision_start|>", "<|vision_end|>"}),
        # A tokenizer that a family shares, in a model of texts only.
        ({"image_token_id": IDS["<|image_pad|>"], "vision_config": None}, QWEN, [], set()),
        # Its numbers are those of other tokens.
        ({"audio_config": {}, "audio_token_index": 300}, ["<|a|>"], [], set()),
        (
            {"vision_config": {}, "image_token_index": 514, "boi_token_index": 512, "eoi_token_index": 513},
            ["<soi>", "<eoi>", "<soft>", "<unused>"],
            ["<soi>", "<eoi>", "<soft>"],
            {"<soi>", "<eoi>"},
        ),
        (
            {"vision_config": {}, "image_token_id": 512},
            ["<image>", "<global-img>", "<row_6_col_1>", "<row>", "[IMG_BREAK]"],
            ["<image>", "<global-img>", "<row_6_col_1>", "[IMG_BREAK]"],
            set(),
        ),
    ],
    ids=["qwen", "texts-only", "other-numbers", "gemma", "tiles"],
)
def test_which_tokens_they_are(
    tmp_path: Path, config: dict[str, Any], marks: list[str], texts: list[str], around: set[str]
) -> None:
    found = _media(_folder(tmp_path, config, marks))
    assert list(found.texts.values()) == texts
    assert {found.texts[token] for token in found.around} == around


def test_the_text_part_refuses_all_of_them(tmp_path: Path) -> None:
    """In a prompt that the request writes itself; what a message says is text, as of any control token."""
    _folder(tmp_path, CONFIG, QWEN, special=False)
    tokenizer, limits = TextTokenizer.load(tmp_path), GenerationLimits(context=128)
    media = MediaTokens.load(tmp_path, tokenizer)
    parser = RequestParser(tokenizer, Chat.load(tmp_path, tokenizer, limits, media.literals), limits, media=media)
    for mark in QWEN[1:]:
        text = f"Look: {mark} here."
        messages = encode_texts([json.dumps([{"role": "user", "content": text}])])[None]
        refused = [
            {"text_input": encode_texts([text])[None]},
            {"input_ids": np.array([[5, IDS[mark], 7]], np.int32)},
            {"messages": messages, "split_special_tokens": np.array([[False]])},
        ]
        for inputs in refused:
            with pytest.raises(InvalidRequest) as raised:
                parser.parse(inputs)
            assert str(raised.value) == (
                f"the prompt has the token {mark}, a mark of images, videos or sound, and this model is served by its "
                "text part: a text must not hold it"
            )
        assert not {*parser.parse({"messages": messages}).prompt_ids} & {*IDS.values()}
    assert parser.parse({"text_input": encode_texts(["<|im_start|>user"])[None]}).prompt_ids[0] == IDS["<|im_start|>"]
    plain = RequestParser(tokenizer, None, limits)  # a model of texts only may have such tokens
    assert IDS["<|image_pad|>"] in plain.parse({"text_input": encode_texts(["<|image_pad|>"])[None]}).prompt_ids


def test_marks_beside_images() -> None:
    media = MediaTokens({token: text for text, token in IDS.items() if text != "<|im_start|>"}, frozenset({513, 514}))
    start, end, pad, video, image = 513, 514, 515, 517, 516

    def refused(*ids: int) -> str:
        with pytest.raises(InvalidRequest) as raised:
            media.check_beside(ids, image)
        return str(raised.value)

    for fine in ([], [1, 2], [1, start, image, image, end, 2], [image], [1, image, image, start, image, end]):
        media.check_beside(fine, image)
    assert refused(1, video, 2) == (
        "the prompt has the token <|video_pad|>, and only <|image_pad|> stands for an image: a text must not hold it"
    )
    assert refused(start, image, video, end).startswith("the prompt has the token <|video_pad|>, and only")
    assert refused(pad, image).startswith("the prompt has the token <|vision_pad|>, and only <|image_pad|>")
    away = "the prompt has the token <|vision_start|> away from <|image_pad|>: a text must not hold it there"
    assert refused(1, start, 2, image, end) == refused(start, start, image, end) == refused(image, end, start) == away
    assert refused(end, 1, image).startswith("the prompt has the token <|vision_end|> away from")


def test_marks_of_tiles_in_their_order() -> None:
    media = MediaTokens({1: "<image>", 2: "<a>", 3: "<g>", 4: "<row_1_col_1>", 5: "<row_1_col_2>"})
    written = "<a><row_1_col_1><image><image><a><row_1_col_2><image><image>\n\n<a><g><image><image><a>"
    ids = [2, 4, 1, 1, 2, 5, 1, 1, 9, 2, 3, 1, 1, 2]
    media.check_order([8, *ids, 7, *ids], written * 2)
    media.check_order([8, 9], "")

    def refused(given: list[int], written: str) -> str:
        with pytest.raises(InvalidRequest) as raised:
            media.check_order(given, written)
        return str(raised.value).partition(":")[0]

    assert refused([8, 4], "") == "the prompt has the token <row_1_col_1> where its images have none"
    assert refused([3, *ids], written) == "the prompt has the token <g> where its images have <a>"
    assert refused([*ids, 2], written) == "the prompt has the token <a> where its images have none"
    assert refused(ids[:-1], written) == "the prompt has no more tokens of images where its images have <a>"
    swapped = [5 if token == 4 else 4 if token == 5 else token for token in ids]
    assert refused(swapped, written) == "the prompt has the token <row_1_col_2> where its images have <row_1_col_1>"
