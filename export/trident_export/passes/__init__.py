"""The passes that recipes are made of, by the name that recipes.toml gives them."""

from __future__ import annotations

from trident_export.passes.base import Feeder as Feeder
from trident_export.passes.base import Feeds as Feeds
from trident_export.passes.base import Keep
from trident_export.passes.base import Pass as Pass
from trident_export.passes.blocks import BlockMinima, Blocks
from trident_export.passes.cache import Cache as Cache
from trident_export.passes.embedding import Embedding
from trident_export.passes.gptq import GptqBlocks, GptqRows
from trident_export.passes.half import Half
from trident_export.passes.rotate import Rotate as Rotate
from trident_export.passes.rows import Rows
from trident_export.passes.smooth import Smooth
from trident_export.passes.static import Static

PASSES: dict[str, type[Pass]] = {
    "keep": Keep,
    "blocks": Blocks,
    "block_minima": BlockMinima,
    "rotate": Rotate,
    "gptq_rows": GptqRows,
    "gptq_blocks": GptqBlocks,
    "rows": Rows,
    "smooth": Smooth,
    "static": Static,
    "embedding": Embedding,
    "cache": Cache,
    "half": Half,
}
