"""A system of its own on this machine: systemd as PID 1 of new namespaces, over this machine's files.

Changes go to memory; its network, processes, /run, /tmp and control groups are its own. Root only.
Not for: what needs no service manager (support/netns.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path

from .netns import wait_until

__all__ = ["SYSTEMD", "Booted"]

SYSTEMD = "/lib/systemd/systemd"

# $1: a directory for the layer; $2: the name of the control group.
_ENTER = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/cgroup" "$1/upper" "$1/work" "$1/root"
mount -t cgroup2 cgroup2 "$1/cgroup"
mkdir "$1/cgroup/$2"
echo 0 > "$1/cgroup/$2/cgroup.procs"
umount "$1/cgroup"
exec unshare --pid --fork --kill-child --net --uts --ipc --cgroup sh -c "$BOOT" sh "$1"
"""
# Of this machine's units none is started: two targets that ask for nothing stand in for the usual ones.
_BOOT = """
set -e
root=$1/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
mkdir "$root/dev/net" "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
for node in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 net/tun:10:200; do
    rest=${node#*:}
    mknod -m 666 "$root/dev/${node%%:*}" c "${rest%:*}" "${rest#*:}"
done
mkdir -p "$root/mnt" "$root/etc/systemd/system"
for target in sysinit basic only; do
    printf '[Unit]\\nDefaultDependencies=no\\n' > "$root/etc/systemd/system/$target.target"
done
ip link set lo up
cd "$root"
pivot_root . mnt
umount -l /mnt
exec env -i container=other PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \\
    /lib/systemd/systemd --system --unit=only.target --log-target=null
"""


class Booted:
    """A context manager. `run` runs programs in it, `path` is a file of it."""

    def __init__(self) -> None:
        self._name = f"fasttun-test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._layer = Path("/dev/shm") / self._name  # overlayfs takes no overlay as its upper layer
        self._process: subprocess.Popen[bytes] | None = None
        self._first = 0

    def __enter__(self) -> Booted:
        self._layer.mkdir()
        try:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", _ENTER, "sh", str(self._layer), self._name],
                env={**os.environ, "BOOT": _BOOT}, stdin=subprocess.DEVNULL)
            self._first = wait_until(self._find_first, 10, what="PID 1")
            wait_until(lambda: self.run("systemctl", "is-system-running", check=False) == "running\n", 20)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find_first(self) -> int:
        assert self._process is not None
        assert self._process.poll() is None, "it did not boot"
        pid = self._process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError):  # a step of the way there, ended meanwhile
                if os.readlink(f"/proc/{child}/exe").endswith("/systemd"):
                    return int(child)
        return 0

    def run(self, *words: str, check: bool = True) -> str:
        """stdout and stderr of a program in it. AssertionError with them unless it ends with 0, or not `check`."""
        done = subprocess.run(
            ["nsenter", f"--target={self._first}", "--all", "env", "-i",
             "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{words}: status {done.returncode}\n{done.stdout}"
        return done.stdout

    def path(self, path: str) -> Path:
        return Path(f"/proc/{self._first}/root") / path.lstrip("/")

    def show(self, unit: str, field: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--property", field, "--value", unit).strip()

    def close(self) -> None:
        """Ends all in it. May be called again."""
        if self._process is not None:
            if self._first:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._first, signal.SIGKILL)  # and with PID 1 the rest
            self._process.kill()
            self._process.wait()
            self._process = None
            try:
                self._remove_groups()
            finally:
                shutil.rmtree(self._layer)
        elif self._layer.exists():
            shutil.rmtree(self._layer)

    def _remove_groups(self) -> None:
        script = 'mount -t cgroup2 cgroup2 "$1"; cd "$1"; [ ! -d "$2" ] || find "$2" -depth -type d -exec rmdir {} +'
        for _ in range(50):  # until the last process has left them
            done = subprocess.run(["unshare", "--mount", "sh", "-c", script, "sh", str(self._layer), self._name],
                                  capture_output=True)
            if done.returncode == 0:
                return
            time.sleep(0.05)
        raise AssertionError(f"control groups are left: {done.stderr!r}")
