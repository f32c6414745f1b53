"""Finds backend processes that have died or hang, by their records and by what the kernel shows of them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from trident_serving.launcher import processes
from trident_serving.launcher.processes import ProcessState
from trident_serving.runtime_folder import Record

# A process that is well beats four times a second. One that neither beats nor uses the processor hangs; one that does
# use it, or waits for a disk, may be at something long.
SILENT_SECONDS = 2.0
BUSY_SECONDS = 10.0


class ProcessWatch:
    """Finds backend processes that have died or hang.

    Args:
        look: the state of a process.
        kill: ends one that hangs.
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
        # By process: its processor time when it changed last, and when that was.
        self._ticks: dict[int, tuple[int, float]] = {}

    def fallen(self, records: list[Record]) -> list[tuple[Record, str]]:
        """The processes that serve no more, each once, with what has become of them."""
        now = self._clock()
        late = now - self._last_look > SILENT_SECONDS  # this process was held up, and perhaps all of them were
        self._last_look = now
        alive = Counter((r.model, r.version) for r in records if not self._look(r.pid).dead)
        found = []
        for record in records:
            state = self._look(record.pid)
            if state.dead:
                record.path.unlink(missing_ok=True)
                self._ticks.pop(record.pid, None)
                # One that never was ready: Triton says that its model could not be loaded. One that has a successor:
                # the model was loaded again meanwhile.
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
