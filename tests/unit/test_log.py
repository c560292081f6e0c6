"""Log lines: what a person, a file, the journal and a JSON reader get."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys

import pytest

from fasttun import log


@pytest.fixture(autouse=True)
def _as_it_was():
    root = logging.getLogger("fasttun")
    before = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.level, root.propagate = before


class Terminal(io.StringIO):
    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return True


def written(form: str, verbosity: int = 0, stream: io.StringIO | None = None) -> io.StringIO:
    stream = stream or io.StringIO()
    log.configure(form, verbosity, stream)
    return stream


def test_text_on_a_terminal_is_bare():
    stream = written("text", 1, Terminal())
    logger = logging.getLogger("fasttun.device")
    logger.info("tun0 is up")
    logger.warning("slow: %d", 7)
    logger.debug("details")
    assert stream.getvalue() == ("fasttun: tun0 is up\nfasttun: warning: slow: 7\nfasttun: fasttun.device: details\n")


def test_text_in_a_file_has_the_time():
    stream = written("text")
    logging.getLogger("fasttun").info("hello")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ fasttun: hello\n", stream.getvalue())


def test_text_in_the_journal_has_the_priority(tmp_path, monkeypatch):
    with open(tmp_path / "journal", "w+") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        log.configure("text", 0, stream)
        assert log.is_for_machines()
        logging.getLogger("fasttun").info("hello")
        logging.getLogger("fasttun").error("oh")
        stream.seek(0)
        assert stream.read() == "<6>hello\n<3>error: oh\n"


def test_another_processes_journal_is_not_ours(monkeypatch):
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    log.configure("text", 0, sys.__stderr__)
    assert not log.is_for_machines()


def test_json_is_one_object_a_line_with_extra_fields():
    stream = written("json")
    try:
        raise OSError(5, "bad\nnews")
    except OSError:
        logging.getLogger("fasttun.x").warning(
            "two\nlines %s", "é", exc_info=True, extra={"peer": "192.0.2.1:7", "odd": {1: object}}
        )
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert list(entry)[:4] == ["time", "level", "logger", "message"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entry["time"])
    assert (entry["level"], entry["logger"], entry["message"]) == ("warning", "fasttun.x", "two\nlines é")
    assert entry["peer"] == "192.0.2.1:7"
    assert entry["error"] == "OSError: [Errno 5] bad\nnews"
    assert set(entry) == {"time", "level", "logger", "message", "error", "peer", "odd"}
    assert log.is_for_machines()


def test_text_cannot_be_forged_into_two_lines():
    stream = written("text", 0, Terminal())
    try:
        raise ValueError("a\nb")
    except ValueError:
        logging.getLogger("fasttun").info("x\n\x1b[31my", exc_info=True)
    assert stream.getvalue() == "fasttun: x\\n\\x1b[31my: ValueError: a\\nb\n"


@pytest.mark.parametrize(
    ("verbosity", "shown"),
    [(2, "diwe"), (1, "diwe"), (0, "iwe"), (-1, "we"), (-2, "e"), (-5, "e")],
)
def test_verbosity(verbosity, shown):
    stream = written("json", verbosity)
    logger = logging.getLogger("fasttun.any")
    logger.debug("d")
    logger.info("i")
    logger.warning("w")
    logger.error("e")
    assert "".join(json.loads(line)["message"] for line in stream.getvalue().splitlines()) == shown


def test_a_report_is_shown_whatever_the_verbosity():
    stream = written("json", -3)
    logging.getLogger(log.REPORT).info("counters")
    assert json.loads(stream.getvalue())["message"] == "counters"


def test_configure_again_replaces():
    first, second = written("text"), written("text")
    logging.getLogger("fasttun").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_a_closed_stream_raises_nothing():
    stream = written("text")
    stream.close()
    logging.getLogger("fasttun").info("nobody listens")


def test_the_library_alone_configures_nothing():
    code = "import logging, fasttun.log; print(logging.getLogger('fasttun').handlers, logging.root.handlers)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"
