"""Text in and out of Triton's BYTES tensors, and whether a tokenizer knows it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest

if TYPE_CHECKING:
    from tokenizers import Encoding


def decode_utf8(value: object, field: str) -> str:
    """One element of a BYTES tensor as text.

    Raises:
        InvalidRequest: the bytes are not UTF-8; the message gives the offset of the first bad byte.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise InvalidRequest(f"{field} must hold bytes, found {type(value).__name__}")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"{field} is not UTF-8: byte {value[error.start]:#04x} at offset {error.start} of {len(value)}"
        ) from None


def decode_texts(tensor: NDArray[np.object_], field: str, max_bytes: int | None = None) -> list[str]:
    """Every element of a BYTES tensor of any shape as text, in C order.

    Raises:
        InvalidRequest: an element is not UTF-8, or is longer than `max_bytes` bytes.
    """
    elements = tensor.reshape(-1).tolist()
    names = numbered(field, len(elements))
    for name, element in zip(names, elements, strict=True):
        if max_bytes is not None and len(element) > max_bytes:
            raise InvalidRequest(f"{name} has {len(element)} bytes, the limit is {max_bytes} bytes")
    return [decode_utf8(element, name) for name, element in zip(names, elements, strict=True)]


def numbered(field: str, count: int) -> list[str]:
    """The names of a field's elements in error messages: the field's own, with an index if there are several."""
    return [field] if count == 1 else [f"{field}[{index}]" for index in range(count)]


def encode_texts(texts: Iterable[str]) -> NDArray[np.object_]:
    """Texts as a BYTES tensor [texts], in UTF-8."""
    return np.array([text.encode("utf-8") for text in texts], dtype=np.object_)


def knows_nothing(encoding: Encoding, unk_token_id: int | None) -> bool:
    """Whether no token of a text is known; special tokens and SentencePiece's bare spaces do not count."""
    if unk_token_id is None:
        return False
    return all(
        special or token_id == unk_token_id or not token.strip("▁")
        for token_id, token, special in zip(encoding.ids, encoding.tokens, encoding.special_tokens_mask, strict=True)
    )
