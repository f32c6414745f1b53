"""Finds models that Triton can't finish unloading, and processes that serve nothing any more.

Triton unloads a model once nothing holds it. A gRPC stream that its client cancels between the last response and the
end of the stream stays in tritonserver 2.51 for ever, and holds its model: that stays UNLOADING, or, where another load
has taken its place, its process stays with all its memory (docs/decisions/0091). This module only decides; it needs no
server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Sequence

from trident_serving.launcher import processes
from trident_serving.launcher.processes import ProcessState
from trident_serving.runtime_folder import Record

# From the last answer to the backend's `finalize`, which removes the record, Triton takes a second.
IDLE_SECONDS = 5.0
_STAGES = ("tokenizer", "preprocess", "model", "postprocess")  # roles of stages, in their names behind the public one


class Leftovers:
    """Looks again and again, and reports what has been left over for `IDLE_SECONDS`.

    Args:
        look: gives the state of a process.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        look: Callable[[int], ProcessState] = processes.state,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look
        self._clock = clock
        self._since: dict[Hashable, float] = {}

    def find(
        self, unloading: Collection[tuple[str, str]], records: Sequence[Record]
    ) -> tuple[list[Record], list[tuple[str, str]]]:
        """What has been left over.

        Args:
            unloading: models and versions that are being unloaded.
            records: of the backend processes.

        Returns:
            The processes that have no request; those of `unloading` whose stages have none either.
        """
        replaced, busy = self._replaced(records), [record.model for record in records if record.open]
        left = [
            r
            for r in records
            if not r.open and (r in replaced or ((r.model, r.version) in unloading and not _has_request(r.model, busy)))
        ]
        models = [each for each in sorted(unloading) if each[0] not in busy and not _has_request(each[0], busy)]
        now = self._clock()
        kept: list[Hashable] = [*(record.path for record in left), *models]
        self._since = {each: self._since.get(each, now) for each in kept}
        late = {each for each, since in self._since.items() if now - since >= IDLE_SECONDS}
        self._since.update(dict.fromkeys(late, now))  # what is done about it takes its time, too
        return [record for record in left if record.path in late], [each for each in models if each in late]

    def _replaced(self, records: Sequence[Record]) -> list[Record]:
        """The processes of versions that a later process serves; none of a model that is still being loaded."""
        loading = {record.model for record in records if not record.beat}
        newest: dict[tuple[str, str], tuple[int, Record]] = {}
        for record in records:
            key, started = (record.model, record.version), self._look(record.pid).started
            if key not in newest or started > newest[key][0]:
                newest[key] = started, record
        return [r for r in records if newest[r.model, r.version][1] is not r and r.model not in loading]


def _has_request(model: str, busy: Sequence[str]) -> bool:
    """Whether a request may be under way to a model: one that a stage of its ensemble answers now.

    Args:
        busy: models that answer requests.
    """
    public = _public(model)
    return any(other != model and _public(other) == public and _is_stage(other) for other in busy)


def _is_stage(model: str) -> bool:
    return model.partition("_")[2].startswith(_STAGES)


def _public(model: str) -> str:
    return model.partition("_")[0]
