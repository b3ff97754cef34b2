"""Signals that end a command. Oracle: exit codes of a shell, and what is left on the disk and on the terminal."""

import os
import pty
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import ROOT, SMALL, TEXT

PROGRAM = """
import signal, sys, time
from ptq import cli, inspection

def wait(*_, **__):
    try:
        print("waiting", flush=True)
        while True:
            time.sleep(0.05)
    finally:
        print("cleaning", flush=True)
        time.sleep(1)
        print("clean", flush=True)

inspection.inspect = wait
sys.exit(cli.main(["inspect", "somewhere"]))
"""


def started(program: list[str], **options: object) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment |= options.pop("env", {})  # type: ignore[operator,arg-type]
    return subprocess.Popen([sys.executable, *program], text=True, env=environment, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(("sent", "code", "cleaned"), [
    ([signal.SIGTERM], 143, True),
    ([signal.SIGTERM, signal.SIGHUP], 143, True),
    ([signal.SIGHUP, signal.SIGTERM], 129, True),
    ([signal.SIGTERM, signal.SIGTERM], -15, False),
])  # fmt: skip
def test_several_signals(sent: list[signal.Signals], code: int, cleaned: bool) -> None:
    """The other kind does not cut the cleaning short; the same one again ends at once."""
    process = started(["-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(sent[0])
    assert process.stdout.readline() == "cleaning\n"
    for each in sent[1:]:
        process.send_signal(each)
    out, err = process.stdout.read(), process.stderr.read()  # with what has been read ahead
    assert process.wait(60) == code
    assert (out == "clean\n") == cleaned
    assert "Traceback" not in err


def test_what_a_caller_has_set_stays() -> None:
    """As nohup, which lets a terminal go."""
    ignoring = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    process = started(["-c", ignoring + PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    """What would be said has nowhere to go; the exit code and the run that can go on are there."""
    long = [f"calibration.dataset.files=[{TEXT}/calibration.txt]", "calibration.samples=64",
            "calibration.sequence_length=512"]  # fmt: skip
    settings = [f"--set={item}" for item in [f"output={tmp_path / 'out'}", *SMALL, *long]]
    program = ["-m", "ptq.gptq", "--config", "demo.yaml", *settings]
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        os.execve(sys.executable, [sys.executable, *program], {**os.environ, "PYTHONPATH": paths})
    seen, deadline = b"", time.monotonic() + 120
    while not any((tmp_path / ".out.run" / "blocks").glob("*.json")) and time.monotonic() < deadline:
        seen += os.read(terminal, 1 << 16)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129, seen[-2000:].decode()
    assert [path.name for path in tmp_path.iterdir()] == [".out.run"]


def test_a_process_that_waits_for_others_is_ended(tmp_path: Path) -> None:
    """It waits in C++, a day long, where no handler of Python's is called."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = [f"--set={item}" for item in [f"output={tmp_path / 'out'}", *SMALL]]
    env = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    process = started(["-m", "ptq.gptq", "--config", "demo.yaml", *settings], env=env, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:  # it listens from the moment it waits
        with socket.socket() as knock:
            if knock.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.1)
    time.sleep(1)
    process.terminate()
    try:
        assert process.wait(10) == -signal.SIGTERM
    finally:
        process.kill()
