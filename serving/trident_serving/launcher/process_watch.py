"""Finds backend processes that have died or hang, by their records and by what the kernel shows of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from trident_serving.launcher import processes
from trident_serving.launcher.processes import ProcessState
from trident_serving.runtime_folder import Record

# A healthy process beats twice a second. A process that neither beats nor uses the processor hangs. One that uses
# the processor, or waits for a disk, may be in a long step, so it gets more time.
SILENT_SECONDS = 2.0
BUSY_SECONDS = 10.0


class ProcessWatch:
    """Finds backend processes that have died or hang.

    Args:
        look: gives the state of a process.
        kill: ends a process that hangs.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        look: Callable[[int], ProcessState] = processes.state,
        kill: Callable[[int], None] = processes.kill,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look
        self._kill = kill
        self._clock = clock
        self._last_look = clock()
        # By process id: its processor time when it last changed, and when that was.
        self._ticks: dict[int, tuple[int, float]] = {}

    def fallen(self, records: list[Record]) -> list[tuple[Record, str]]:
        """The processes that no longer serve, each reported once, with what happened to it."""
        now = self._clock()
        late = now - self._last_look > SILENT_SECONDS  # this process was suspended, and the others perhaps too
        self._last_look = now
        states = [self._look(record.pid) for record in records]
        alive = Counter((r.model, r.version) for r, state in zip(records, states, strict=True) if not state.dead)
        found = []
        for record, state in zip(records, states, strict=True):
            if state.dead:
                record.path.unlink(missing_ok=True)
                self._ticks.pop(record.pid, None)
                # Not reported: a process that never was ready, because Triton reports the failed load itself; and one
                # with a successor, because its model was loaded again.
                if record.beat and not alive[record.model, record.version]:
                    found.append((record, "has died"))
            elif record.beat and not late and self._hangs(record, state, now):
                self._kill(record.pid)
                record.path.unlink(missing_ok=True)
                found.append((record, "did not answer and was ended"))
        return found

    def _hangs(self, record: Record, state: ProcessState, now: float) -> bool:
        ticks, since = self._ticks.get(record.pid, (-1, now))
        if ticks != state.ticks:
            ticks, since = state.ticks, now
            self._ticks[record.pid] = (ticks, since)
        if state.stopped:
            return True
        silent = now - record.beat
        idle = state.letter != "D" and now - since >= SILENT_SECONDS
        return silent >= (SILENT_SECONDS if idle else BUSY_SECONDS)
