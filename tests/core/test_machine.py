"""The kernel's files of a made-up machine are read as they are meant."""

import os

from astrai_core.machine import available_memory, cores


def write_files(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_memory_is_bounded_by_every_control_group_and_by_the_machine(tmp_path):
    assert available_memory(tmp_path) is None
    write_files(
        tmp_path,
        {
            "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
            "proc/self/status": "Name: x\nRssFile:\t 1000 kB\n",
        },
    )
    assert available_memory(tmp_path) == 7000 * 1024
    write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/memory.max": "4096000\n",
            "sys/fs/cgroup/outer/memory.current": "2048000\n",
            "sys/fs/cgroup/outer/memory.stat": "anon 5\ninactive_file 24000\nactive_file 1000\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/memory.current": "1000\n",
        },
    )
    assert available_memory(tmp_path) == 4096000 - 2048000 + 25000 - 1000 * 1024


def test_the_older_control_groups_are_read_too(tmp_path):
    write_files(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "300000\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 50\ninactive_file 7\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
    )
    assert available_memory(tmp_path) == 700050
    assert cores(tmp_path).quota == 1.5


def test_the_narrowest_quota_counts_and_siblings_are_one_core(tmp_path):
    mask = cores(tmp_path).mask
    assert set(mask) == os.sched_getaffinity(0)
    assert cores(tmp_path).physical == len(mask)  # nobody tells: each counts
    assert cores(tmp_path).most == len(mask)
    write_files(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/cpu.max": "max 100000\n",
            "sys/fs/cgroup/a/cpu.max": "100000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            **{
                f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": "0-99\n"
                for n in mask
            },
        },
    )
    found = cores(tmp_path)
    assert (found.quota, found.most, found.physical) == (1.0, 1, 1)
