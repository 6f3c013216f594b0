"""What control groups leave of memory, read from trees as systemd, Slurm and containers make them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pasture.engine import memory
from pasture.engine.control_groups import bytes_left

FREE = 1 << 60


class Machine:
    """A file system's root."""

    def __init__(self, root: Path, *memberships: str) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in memberships))

    def group(self, path: str, limit: str, used: int, cache: int = 0) -> None:
        """Of version 2."""
        self._write(f"sys/fs/cgroup/{path}", {"memory.max": limit, "memory.current": str(used)})
        self._write(f"sys/fs/cgroup/{path}", {"memory.stat": f"anon 7\ninactive_file {cache}\nactive_file 9\n"})

    def old_group(self, path: str, limit: int, used: int, cache: int = 0) -> None:
        """Of version 1."""
        where = f"sys/fs/cgroup/memory/{path}"
        self._write(where, {"memory.limit_in_bytes": str(limit), "memory.usage_in_bytes": str(used)})
        self._write(where, {"memory.stat": f"inactive_file 5\ntotal_inactive_file {cache}\n"})

    def _write(self, where: str, files: dict[str, str]) -> None:
        (self.root / where).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (self.root / where / name).write_text(f"{content}\n")


def test_a_service_under_systemd(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/system.slice/pasture.service")
    machine.group("system.slice", "max", 9000)
    machine.group("system.slice/pasture.service", "1000", 700, cache=50)
    machine.group("system.slice/other.service", "10", 10)
    assert bytes_left(tmp_path) == 350


def test_whoever_is_above_binds_too(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/slurmstepd.scope/job_7/step_0/user/task_0")
    machine.group("slurmstepd.scope/job_7", "2000", 1900, cache=20)
    machine.group("slurmstepd.scope/job_7/step_0/user/task_0", "max", 100)
    assert bytes_left(tmp_path) == 120
    machine.group("slurmstepd.scope/job_7/step_0", "500", 450)
    assert bytes_left(tmp_path) == 50


def test_version_1(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "5:cpu,cpuacct:/elsewhere", "4:memory:/slurm/uid_1/job_7", "1:name=systemd:/user.slice", "0::/")
    machine.old_group("", (1 << 63) - 4096, FREE)
    machine.old_group("slurm/uid_1", 3000, 1000)
    machine.old_group("slurm/uid_1/job_7", 1500, 1000, cache=100)
    machine.old_group("elsewhere", 1, 1)
    assert bytes_left(tmp_path) == 600


@pytest.mark.parametrize("membership", ["0::/", "0::/docker/4711", "0::/../beside", "4:memory:/docker/4711"])
def test_in_a_container_the_mounted_group_counts_whatever_the_path_says(tmp_path: Path, membership: str) -> None:
    machine = Machine(tmp_path, membership)
    machine.group("", "1000", 400)
    assert bytes_left(tmp_path) == 600


def test_in_a_container_of_version_1(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "4:memory:/docker/4711")
    machine.old_group("", 1000, 400, cache=30)
    assert bytes_left(tmp_path) == 630


def test_a_full_group_leaves_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/full")
    machine.group("full", "1000", 1200)
    assert bytes_left(tmp_path) == 0


def test_without_limits_there_is_nothing_to_say(tmp_path: Path) -> None:
    assert bytes_left(tmp_path) is None
    machine = Machine(tmp_path, "0::/user.slice")
    machine.group("user.slice", "max", 1200)
    assert bytes_left(tmp_path) is None


def test_the_smaller_of_machine_and_groups_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pasture.engine.control_groups.bytes_left", lambda: 12345)
    assert memory.available_bytes() == 12345
    monkeypatch.setattr("pasture.engine.control_groups.bytes_left", lambda: FREE)
    assert 12345 < memory.available_bytes() < FREE
