"""An answer's text, reasoning and calls of tools, parted as it comes.

`parser` is the machine, `families` how families of models write calls, `formats` which of them a chat template shows.
"""

from trident_serving.generation.parsing.formats import FAMILIES, ForcedCall, forced_call, format_of, schemas_of
from trident_serving.generation.parsing.parser import (
    AnswerParser,
    CallArguments,
    CallName,
    Part,
    Reasoning,
    Text,
    merged,
)

__all__ = [
    "FAMILIES",
    "AnswerParser",
    "CallArguments",
    "CallName",
    "ForcedCall",
    "Part",
    "Reasoning",
    "Text",
    "forced_call",
    "format_of",
    "merged",
    "schemas_of",
]
