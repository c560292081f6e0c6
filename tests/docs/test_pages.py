"""Every command and every script of the tutorial and the how-tos is run, and prints what the page shows.

How the blocks are read and run: support/transcript.py. Not for: the site made of the pages (test_site.py).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.transcript import Machine, blocks, matches, steps

DOCS = Path(__file__).resolve().parents[2] / "docs"
TUTORIAL = sorted((DOCS / "tutorial").glob("[1-9]-*.md"))
HOWTOS = sorted((DOCS / "howto").glob("*.md"))
RUNS = {"tutorial": TUTORIAL, **{page.stem: [page] for page in HOWTOS if page.stem != "index"}}


@pytest.mark.netns
@pytest.mark.parametrize("name", RUNS)
def test_the_page_tells_the_truth(name: str) -> None:
    with Machine() as machine:
        for step, good, output in machine.follow(RUNS[name]):
            assert good, f"{step.where}\nshown:\n{step.shown}\nprinted:\n{output}"


@pytest.mark.parametrize("page", [*TUTORIAL, *HOWTOS], ids=lambda page: page.stem)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("console", "python", "text"), f"line {block.line}: {block.language}"
        if block.language == "console" and not block.skip:
            assert steps(block), f"line {block.line}: no command"
        if block.language == "python":
            assert block.title or block.skip, f"line {block.line}: a script needs a title, so that it can be run"
        if block.title and not block.skip:
            run = "".join(other.text for other in blocks(page) if other.language == "console")
            assert block.title in run, f"line {block.line}: {block.title} is not run on this page"


def test_the_pages_are_those_of_the_issue() -> None:
    assert len(TUTORIAL) == 7
    assert {"site-to-site", "exit-node", "many-clients", "asyncio", "without-root", "service"} <= set(RUNS)


PING = """\
PING 10.7.0.1 (10.7.0.1) 56(84) bytes of data.
64 bytes from 10.7.0.1: icmp_seq=1 ttl=64 time=0.233 ms

--- 10.7.0.1 ping statistics ---
1 packets transmitted, 1 received, 0% packet loss, time 0ms
rtt min/avg/max/mdev = 0.233/0.233/0.233/0.000 ms
"""


@pytest.mark.parametrize(("shown", "real"), [
    (PING, PING.replace("0.233", "1").replace("time 0ms", "time 12ms")),
    ("3: tun0: <UP> mtu 1472\n", "17: tun0: <UP> mtu 1472 \n"),
    ("eth0@if2 UP\n", "eth0@if31 UP\n"),
    ("link/ether d6:e7:40:15:1b:a5\n", "link/ether 02:00:00:00:00:01\n"),
    ("12:00:00.1 IP 198.51.100.2.49809 > 198.51.100.1.1234: UDP\n",
     "23:59:59.999999 IP 198.51.100.2.60001 > 198.51.100.1.1234: UDP\n"),
    ("tun type tun pi off …\n", "tun type tun pi off vnet_hdr off\n"),
    ("first\n…\nlast\n", "first\nlast\n"),
    ("first\n…\nlast\n", "first\n\nmore\nlast\n"),
    ("…\n", ""),
    (f"PublicKey = {'a' * 43}=\n", f"PublicKey = {'+/9Z' * 10}xyz=\n"),
])
def test_the_same_up_to_what_varies(shown: str, real: str) -> None:
    assert matches(shown, real)


@pytest.mark.parametrize(("shown", "real"), [
    (PING, PING.replace("1 received", "0 received")),
    (PING, PING.replace("ttl=64", "ttl=63")),
    (PING, PING + "more\n"),
    (PING, ""),
    ("", PING),
    ("mtu 1472\n", "mtu 1468\n"),
    ("listens on UDP port 1234\n", "listens on UDP port 1235\n"),
    ("UDP, length 84\n", "UDP, length 88\n"),
    ("a … c\n", "a b\nc\n"),
    ("first\n…\nlast\n", "first\nlast\nmore\n"),
    ("inet 10.7.0.1/24\n", "inet 10.7.0.1/32\n"),
])
def test_not_the_same(shown: str, real: str) -> None:
    assert not matches(shown, real)


def test_numbers_may_vary_where_the_page_says_so() -> None:
    shown, real = "sendto      6921\ntotal  27639\n", "sendto        49\ntotal    451\n"
    assert not matches(shown, real)
    assert matches(shown, real, numbers_vary=True)
    assert not matches(shown, real.replace("sendto", "sendmmsg"), numbers_vary=True)


@pytest.mark.netns
def test_a_page_that_lies_is_found(tmp_path: Path) -> None:
    """The runner itself: what it takes for true, what for false, and that nothing of it is left."""
    page = tmp_path / "page.md"
    page.write_text("""\
```text
host# not run
```

<!-- test: skip for this test -->
```console
host# exit 1
```

```python title="hello.py"
print("hello")
```

```console
host# ip netns add docs
host# echo one; echo two
one
three
host# false
host# true
docs# python hello.py
hello
docs# ip -brief link
lo               DOWN           …
docs$ id -u; touch /root/no 2> /dev/null || echo no
1000
no
docs# cat <<END
> several lines
> END
several lines
docs# (sleep 0.5; echo late > late.txt) &
docs# cat late.txt
late
```
""")
    with Machine() as machine:
        told = {step.command.splitlines()[0]: good for step, good, _ in machine.follow([page])}
    assert [command for command, good in told.items() if not good] == ["echo one; echo two", "false"]
    assert len(told) == 10
    assert not Path("/run/netns/docs").exists()


def test_a_block_needs_a_prompt(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\nls\n```\n")
    with pytest.raises(AssertionError, match=re.escape("page.md:2: starts with no prompt: ls")):
        steps(next(blocks(page)))
