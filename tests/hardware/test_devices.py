"""Devices, memory and threads are what this process may use."""

from __future__ import annotations

import os

import pytest

from kani_nb.errors import ConfigError
from kani_nb.hardware import devices
from kani_nb.hardware.cgroup import CgroupLimits, read_limits


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_limits_of_version_2_are_the_lowest_on_the_way_to_the_root(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("0::/outer/inner\n")
    write(root / "outer" / "inner", memory__max="max\n", cpu__max="max 100000\n")
    write(
        root / "outer",
        memory__max="1000\n",
        memory__current="700\n",
        memory__stat="anon 500\ninactive_file 150\n",
        cpu__max="150000 100000\n",
    )
    assert read_limits(root, membership) == CgroupLimits(1000, 450, 1.5)


def test_limits_of_version_1_are_read(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    membership.write_text("5:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/\n")
    write(root / "memory" / "box", memory__limit_in_bytes="2000", memory__usage_in_bytes="500")
    write(root / "memory", memory__limit_in_bytes="9223372036854771712")
    write(root / "cpu,cpuacct" / "box", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000")
    write(root / "cpu,cpuacct", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert read_limits(root, membership) == CgroupLimits(2000, 1500, 2.0)


def test_a_machine_without_control_groups_has_no_limits(tmp_path):
    assert read_limits(tmp_path / "none", tmp_path / "neither") == CgroupLimits()


def test_main_memory_is_within_the_containers_limit(monkeypatch):
    import psutil

    assert 0 < devices.cpu_memory()[1] <= devices.cpu_memory()[0] <= psutil.virtual_memory().total
    monkeypatch.setattr(devices, "read_limits", lambda: CgroupLimits(1000, 300))
    assert devices.cpu_memory() == (1000, 300)


def test_the_cpu_is_always_listed_and_free_bytes_knows_it():
    found = devices.list_devices()
    assert found[-1].name == "cpu"
    assert devices.best_device() in {each.name for each in found}
    assert 0 < devices.free_bytes("cpu") <= found[-1].total_bytes


def test_an_unknown_device_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"no device 'cuda:99'.*cpu"):
        devices.free_bytes("cuda:99")


def test_hyperthreads_share_a_core(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        write(tmp_path / f"cpu{cpu}" / "topology", thread_siblings_list=siblings)
    assert devices.physical_cores((0, 1, 2, 3), tmp_path) == 2
    assert devices.physical_cores((0, 2), tmp_path) == 1


def test_cores_without_a_topology_are_counted_by_the_machines_ratio(tmp_path):
    assert 1 <= devices.physical_cores(devices.allowed_cpus(), tmp_path) <= len(devices.allowed_cpus())


@pytest.mark.parametrize(
    ("cores", "cpus", "quota", "idle", "threads", "because"),
    [
        (8, 16, None, 15.9, 8, "8 physical cores (16 CPUs)"),
        (2, 2, None, 1.0, 1, "1.0 CPUs idle"),
        (2, 2, None, 1.75, 2, "2 physical cores"),
        (64, 128, 3.5, 120.0, 3, "a container's quota of 3.5 CPUs"),
        (4, 4, 0.5, 4.0, 1, "a container's quota of 0.5 CPUs"),
        (4, 8, None, 0.0, 1, "0.0 CPUs idle"),
    ],
)
def test_threads_are_the_narrowest_of_cores_quota_and_idle_cpus(cores, cpus, quota, idle, threads, because):
    choice = devices.limited_threads(cores, cpus, quota, idle)
    assert choice.threads == threads
    assert choice.reason.startswith(because)


def test_the_users_own_choice_is_taken(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert devices.choose_threads(7).threads == 7
    assert devices.choose_threads() == devices.ThreadChoice(3, "OMP_NUM_THREADS says so")


def test_a_busy_cpu_is_not_counted_as_idle(monkeypatch):
    import subprocess
    import sys

    monkeypatch.delenv("OMP_NUM_THREADS")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in devices.allowed_cpus()]
    try:
        while devices.idle_cpus(sample_s=0.1) > 0.5:
            assert all(process.poll() is None for process in busy)
        assert devices.choose_threads(sample_s=0.2).threads == 1
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_this_process_has_the_cpus_it_may_run_on():
    assert set(devices.allowed_cpus()) <= set(range(os.cpu_count()))
