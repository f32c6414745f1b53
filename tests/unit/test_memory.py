"""The memory that this process may still take, by trees of files like a kernel's; and the memory of an export."""

from __future__ import annotations

from pathlib import Path

import pytest

from trident_export import memory as export_memory
from trident_export import needs, recipes
from trident_export.errors import NoMemory
from trident_export.recipes import Kind
from trident_serving import memory

GIB = 1 << 30
V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime shared:7 - cgroup cgroup rw,memory"
V2_MOUNT = "41 31 0:38 {root} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate"


class Machine:
    """A root folder with 8 GiB available and whatever groups a test makes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 16777216 kB\nMemAvailable: {8 * GIB // 1024} kB\n")

    def write(self, name: str, text: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(text)

    def v2(self, folder: str, limit: object, used: float, *, high: object = "max", stat: str = "") -> None:
        base = f"sys/fs/cgroup/{folder}"
        self.write(f"{base}/memory.max", f"{limit}\n")
        self.write(f"{base}/memory.high", f"{high}\n")
        self.write(f"{base}/memory.current", f"{int(used * GIB)}\n")
        self.write(f"{base}/memory.stat", f"anon 1\nfile 1\n{stat}")

    def v1(self, folder: str, limit: int, used: float, stat: str = "") -> None:
        base = f"sys/fs/cgroup/memory/{folder}"
        self.write(f"{base}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{base}/memory.usage_in_bytes", f"{int(used * GIB)}\n")
        self.write(f"{base}/memory.stat", f"cache 1\nrss 1\n{stat}")

    @property
    def available(self) -> float:
        return memory.available_bytes(self.root) / GIB


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_groups_the_machine_decides(machine: Machine) -> None:
    assert machine.available == 8


def test_a_systemd_unit_is_found_by_its_path_and_every_slice_above_it_counts(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/system.slice/ai.slice/trident.service\n")
    machine.write("proc/self/mountinfo", V2_MOUNT.format(root="/") + "\n")
    machine.v2("system.slice/ai.slice/trident.service", "max", 1)
    assert machine.available == 8
    machine.v2("system.slice/ai.slice/trident.service", 6 * GIB, 1)
    assert machine.available == 5
    machine.v2("system.slice/ai.slice", 4 * GIB, 2)  # the slice has others in it
    assert machine.available == 2
    machine.v2("system.slice", "max", 3)
    machine.v2("other.slice", GIB, 1)  # not ours
    assert machine.available == 2


def test_a_unit_is_slowed_down_beyond_memory_high(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/trident.service\n")
    machine.write("proc/self/mountinfo", V2_MOUNT.format(root="/") + "\n")
    machine.v2("trident.service", 6 * GIB, 1, high=3 * GIB)
    assert machine.available == 2


def test_a_container_with_a_namespace_sees_its_own_group_at_the_root_of_the_mount(machine: Machine) -> None:
    machine.write("proc/self/cgroup", "0::/\n")
    machine.write("proc/self/mountinfo", V2_MOUNT.format(root="/") + "\n")
    machine.v2("", 4 * GIB, 1)
    assert machine.available == 3


def test_a_container_without_a_namespace_has_the_hosts_path_and_a_mount_of_its_own_group(machine: Machine) -> None:
    path = "/docker/0123456789ab"
    machine.write("proc/self/cgroup", f"12:cpu,cpuacct:{path}\n8:memory:{path}\n")
    machine.write("proc/self/mountinfo", V1_MOUNT.format(root=path) + "\n")
    machine.v1("", 4 * GIB, 1)
    assert machine.available == 3
    # A path that the mount does not show: the mount's root is the nearest that is seen.
    machine.write("proc/self/cgroup", "8:memory:/../../elsewhere\n")
    assert machine.available == 3


def test_both_versions_together(machine: Machine) -> None:
    """Hybrid: version 2 without controllers at unified/, memory in version 1; a mount point has a space in it."""
    machine.write("proc/self/cgroup", "4:memory:/app/one\n1:name=systemd:/x:y\n0::/app\n")
    unified = "42 31 0:39 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    moved = "35 31 0:32 / /sys/fs/cg\\040roup rw - cgroup cgroup rw,memory"
    machine.write("proc/self/mountinfo", f"{unified}\n{moved}\n")
    machine.write("sys/fs/cg roup/app/one/memory.limit_in_bytes", f"{4 * GIB}\n")
    machine.write("sys/fs/cg roup/app/one/memory.usage_in_bytes", f"{GIB}\n")
    assert machine.available == 3
    machine.write("sys/fs/cg roup/app/memory.limit_in_bytes", f"{3 * GIB}\n")
    machine.write("sys/fs/cg roup/app/memory.usage_in_bytes", f"{2 * GIB}\n")
    assert machine.available == 1


def test_version_1_says_the_smallest_limit_of_groups_out_of_sight(machine: Machine) -> None:
    machine.v1("", 2**63 - 4096, 1, f"hierarchical_memory_limit {3 * GIB}\n")
    assert machine.available == 2


def test_page_cache_that_is_given_back_counts_as_free(machine: Machine) -> None:
    machine.v2("", 4 * GIB, 3.5, stat=f"inactive_file {2 * GIB}\nactive_file {GIB}\nslab_reclaimable 0\n")
    assert machine.available == 0.5 + 2 + 0.5  # of the active part a half
    machine.v2("", 4 * GIB, 1, stat=f"inactive_file {2 * GIB}\n")  # counted at another moment than memory.current
    assert machine.available == 4


def test_version_1_counts_the_page_cache_of_the_groups_below_too(machine: Machine) -> None:
    machine.v1("", 4 * GIB, 3, f"inactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file {GIB}\n")
    assert machine.available == 1 + 1 + 0.5


def test_a_group_beyond_its_limit_has_no_room(machine: Machine) -> None:
    machine.v2("", GIB, 2)
    assert machine.available == 0


def test_this_machine_has_some() -> None:
    assert 2**28 < memory.available_bytes() < 2**50


@pytest.mark.parametrize(
    ("kind", "millions", "measured"),
    [
        (Kind.DECODER, 253.4, 3.23),
        (Kind.ENCODER, 567.8, 5.63),
        (Kind.SEQ2SEQ, 139.4, 4.85),
    ],
)
def test_the_formula_is_what_was_measured(kind: Kind, millions: float, measured: float) -> None:
    found = export_memory.needed(int(millions * 1e6), kind) / 1e9
    assert measured <= found <= measured + 1.5


def test_an_export_asks_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_memory, "available_bytes", lambda: 27 * 10**8)
    export_memory.require("small", 100_000_000, Kind.DECODER)
    message = r"large \(134 M parameters\) needs about 2.9 GB of memory, and 2.7 GB are available: .*FORCE=1"
    with pytest.raises(NoMemory, match=message):
        export_memory.require("large", 134_500_000, Kind.DECODER)
    export_memory.require("large", 134_500_000, Kind.DECODER, force=True)


def test_what_an_export_needs_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs.os, "cpu_count", lambda: 2)
    variants = {name: recipe for name, recipe in recipes.load().items() if name in ("int8", "fp32")}
    said = needs.sentence(1_540_000_000, Kind.DECODER, variants)
    assert said == "about 11.9 GB of memory, 20.9 GB of disk and 6 minutes"
    alone = {"fp32": variants["fp32"]}  # another name of the graph: nothing is written twice
    assert needs.sentence(1_540_000_000, Kind.DECODER, alone).startswith("about 11.9 GB of memory, 8.1 GB of disk and")
