"""The folder of a launcher, and what those that were killed have left in /tmp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trident_serving.launcher import temporary_folder
from trident_serving.launcher.temporary_folder import TemporaryFolder

_KILLED = """
import os, signal
from trident_serving.launcher.temporary_folder import TemporaryFolder
print(TemporaryFolder().path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def killed() -> Path:
    """The folder of a launcher that was killed."""
    run = subprocess.run([sys.executable, "-c", _KILLED], stdout=subprocess.PIPE, text=True, check=False)
    assert run.returncode == -9
    return Path(run.stdout.strip())


def made(folder: Path, name: str, servers: Path) -> Path:
    """What tritonserver makes of a model's code that a launcher sends."""
    (servers / name / "1").mkdir(parents=True)
    (servers / name / "1" / "model.py").write_text(f"{temporary_folder.mark(folder)}\nimport json\n")
    return servers / name


def test_what_a_killed_launcher_left_is_removed_and_what_a_living_one_needs_is_kept(temporary: Path) -> None:
    servers = temporary / "servers"
    servers.mkdir()
    (temporary / "repository").mkdir()
    (temporary / "repository" / "weights").touch()
    living, gone = TemporaryFolder(), killed()
    (servers / "python_env_Anyone").mkdir()
    (gone / "models").symlink_to(temporary / "repository")
    ours = [made(living.path, "folderLiving", servers), made(gone, "folderKilled", servers)]
    (temporary / "trident-0").mkdir()  # of admin keys
    (temporary / "trident-abcdefgh").mkdir()  # of an earlier version, or one that is being made
    foreign = servers / "folderAnyone" / "1"
    foreign.mkdir(parents=True)
    (foreign / "model.py").write_text("import json\n")
    temporary_folder.remove_abandoned(servers)
    assert {path.name for path in temporary.iterdir()} == {
        *("repository", "servers", "trident-0", "trident-abcdefgh", living.path.name)
    }
    assert (temporary / "repository" / "weights").exists()
    assert [path.exists() for path in ours] == [True, False]
    assert {path.name for path in servers.iterdir()} == {*("folderLiving", "folderAnyone", "python_env_Anyone")}
    temporary_folder.remove_servers(living.path, servers)
    living.close()
    assert {path.name for path in servers.iterdir()} == {"folderAnyone", "python_env_Anyone"}
    assert not living.path.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_left_alone(temporary: Path) -> None:
    gone = killed()
    os.chown(gone, 65534, 65534)
    temporary_folder.remove_abandoned(temporary)
    assert (gone / temporary_folder.LOCK).exists()
    os.chown(gone, 0, 0)
    temporary_folder.remove_abandoned(temporary)
    assert not gone.exists()
