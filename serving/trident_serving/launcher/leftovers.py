"""Finds models that Triton can't finish unloading, and processes that serve nothing any more.

Triton unloads a model once nothing holds it. A gRPC stream that its client cancels between the last response and the
end of the stream stays in tritonserver 2.51 for ever, and holds its model: that stays UNLOADING, or, where another load
has taken its place, its process stays with all its memory (docs/decisions/0091). This module only decides; it needs no
server.

Only records tell that a request has ended: Triton's statistics count it at its end, and its metrics only those that
wait. So what Triton may be using without a record is left alone, however long it takes (docs/decisions/0098).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

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
        self._recorded: set[str] = set()  # models whose processes have had records

    def find(
        self,
        unloading: Collection[tuple[str, str]],
        records: Sequence[Record],
        present: Collection[str] = (),
        shared: Callable[[], Collection[str]] = tuple,
    ) -> tuple[list[Record], list[tuple[str, str]]]:
        """What has been left over.

        Args:
            unloading: models and versions that are being unloaded.
            records: of the backend processes.
            present: models that are loaded, or being loaded or unloaded.
            shared: gives the models that foreign ensembles ask, of whose requests no record tells.

        Returns:
            The processes that have no request; those of `unloading` whose stages have none either.
        """
        states = {record.pid: self._look(record.pid) for record in records}
        records = [record for record in records if not states[record.pid].dead]  # a zombie holds nothing
        started = {pid: state.started for pid, state in states.items()}
        self._recorded |= {record.model for record in records}
        unknown = {_public(name) for name in present if _is_stage(name) and name not in self._recorded}
        busy = [record.model for record in records if record.open]
        ending = {r.path for r in records if (r.model, r.version) in unloading and not _has_request(r.model, busy)}
        left = [
            r
            for r in records
            if not (r.open or _public(r.model) in unknown) and (r.path in ending or _is_replaced(r, records, started))
        ]
        models = [
            each
            for each in sorted(unloading)
            if not (each[0] in busy or _public(each[0]) in unknown or _has_request(each[0], busy))
        ]
        foreign = shared() if left or models else ()  # reads files, once a second if it did so always
        left = [record for record in left if record.model not in foreign]
        models = [each for each in models if each[0] not in foreign]
        now = self._clock()
        kept: list[Hashable] = [*(record.path for record in left), *models]
        self._since = {each: self._since.get(each, now) for each in kept}
        late = {each for each, since in self._since.items() if now - since >= IDLE_SECONDS}
        self._since.update(dict.fromkeys(late, now))  # what is done about it takes its time, too
        return [record for record in left if record.path in late], [each for each in models if each in late]


def _is_replaced(record: Record, records: Sequence[Record], started: Mapping[int, int]) -> bool:
    """Whether a later process serves the version of this one, and no request needs this one any more.

    Triton loads all versions of a model before it serves with any of the new processes. That one of them has taken a
    request shows that it does.

    Args:
        started: when, by process id.
    """
    same = [r for r in records if (r.model, r.version) == (record.model, record.version)]
    newest = max(same, key=lambda r: started[r.pid])
    if newest is record or not newest.taken or any(r.model == record.model and not r.beat for r in records):
        return False
    # A request keeps the stages that it began with.
    earlier = [r.model for r in records if r.open and started[r.pid] < started[newest.pid]]
    return not _has_request(record.model, earlier)


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
