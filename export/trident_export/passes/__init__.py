"""The passes that recipes are made of, by the name that recipes.toml gives them."""

from __future__ import annotations

from trident_export.passes.base import CalibrationRuns as CalibrationRuns
from trident_export.passes.base import Feeds as Feeds
from trident_export.passes.base import Keep
from trident_export.passes.base import Pass as Pass
from trident_export.passes.cache import Cache as Cache
from trident_export.passes.embedding import Embedding
from trident_export.passes.gptq import GptqGroups, GptqPerChannel
from trident_export.passes.groups import GroupMinima, Groups
from trident_export.passes.half import Half
from trident_export.passes.per_token import PerToken
from trident_export.passes.rotate import Rotate as Rotate
from trident_export.passes.smooth import Smooth
from trident_export.passes.spread import Spread
from trident_export.passes.static import Static

PASSES: dict[str, type[Pass]] = {
    "keep": Keep,
    "groups": Groups,
    "group_minima": GroupMinima,
    "rotate": Rotate,
    "spread": Spread,
    "gptq_per_channel": GptqPerChannel,
    "gptq_groups": GptqGroups,
    "per_token": PerToken,
    "smooth": Smooth,
    "static": Static,
    "embedding": Embedding,
    "cache": Cache,
    "half": Half,
}

# What the last release called passes and their keys; these names go with the next one.
RENAMED_PASSES = {
    "blocks": "groups",
    "block_minima": "group_minima",
    "gptq_rows": "gptq_per_channel",
    "gptq_blocks": "gptq_groups",
    "rows": "per_token",
}
RENAMED_KEYS = {"block": "group", "crest": "peak_to_rms"}
