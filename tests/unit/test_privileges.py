"""Dropping root for good, in a child process each; needs root, no namespaces."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from fasttun import privileges
from fasttun.errors import ConfigurationError, DeviceError

PROJECT = Path(__file__).resolve().parents[2]
NOBODY = pwd.getpwnam("nobody")
NET_ADMIN = 1 << 12

CHILD = """
import json, os, sys, threading
sys.path.insert(0, {project!r})
from fasttun import privileges

def status():
    lines = open("/proc/thread-self/status").read().splitlines()
    return dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)

def attempt(call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return 0

result = {{}}
asked, told = threading.Event(), threading.Event()

def older():
    asked.wait()
    result["older"] = status()
    told.set()

threading.Thread(target=older).start()
privileges.drop(privileges.find("nobody"), keep_net_admin={keep})
asked.set(); told.wait()
result["main"] = status()

def younger():
    result["younger"] = status()

thread = threading.Thread(target=younger)
thread.start(); thread.join()
result["setuid"] = attempt(os.setuid, 0)
result["setgid"] = attempt(os.setgid, 0)
result["setgroups"] = attempt(os.setgroups, [0])
result["groups"] = os.getgroups()
privileges.drop(privileges.find("nobody"))  # a second time: nothing happens
print(json.dumps(result))
"""

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@needs_root
@pytest.mark.parametrize("keep", [False, True])
def test_drop_is_complete_in_every_thread_and_for_good(keep):
    code = CHILD.format(project=str(PROJECT), keep=keep)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    for thread in ("older", "main", "younger"):
        status = result[thread]
        assert status["Uid"].split() == [str(NOBODY.pw_uid)] * 4
        assert status["Gid"].split() == [str(NOBODY.pw_gid)] * 4
        kept = NET_ADMIN if keep and thread != "older" else 0
        assert int(status["CapEff"], 16) == kept
        assert int(status["CapPrm"], 16) == kept
        assert int(status["CapInh"], 16) == 0
        assert int(status["CapAmb"], 16) == 0
    for thread in ("main", "younger"):
        assert int(result[thread]["CapBnd"], 16) == 0
        assert result[thread]["NoNewPrivs"] == "1"
    assert result["setuid"] == result["setgid"] == result["setgroups"] == 1  # EPERM
    assert result["groups"] == os.getgrouplist("nobody", NOBODY.pw_gid)


def test_an_unknown_user_is_a_configuration_error():
    with pytest.raises(ConfigurationError) as caught:
        privileges.find("no-such-user-here")
    assert caught.value.field == "user"


def test_root_is_no_one_to_drop_to():
    with pytest.raises(ConfigurationError) as caught:
        privileges.find("root")
    assert caught.value.field == "user"


def test_without_root_another_user_is_refused_before_set_up(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY.pw_uid + 1)
    with pytest.raises(DeviceError, match=r"change user to nobody: .*\[EPERM\]; start fasttun as root"):
        privileges.find("nobody")


def test_oneself_needs_no_root(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: NOBODY.pw_uid)
    monkeypatch.setattr(os, "getresuid", lambda: (NOBODY.pw_uid,) * 3)
    privileges.drop(privileges.find("nobody"))


def test_a_refusal_of_the_kernel_names_the_user(monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no")

    monkeypatch.setattr(privileges, "_drop", refuse)
    with pytest.raises(DeviceError, match="change user to somebody"):
        privileges.drop(privileges.Account("somebody", 12345, 12345))
