"""How a command ends: every error as a sentence and an exit code, and signals as Ctrl-C."""

import argparse
import errno
import signal
import sys
import threading
import traceback
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from ptq.cli_places import expand_places
from ptq.errors import ConfigError, GateError, PtqError

JOINING = "\t\u200c\u200d"
SIGNALLED = 128  # and the number of a signal: as a shell reports a program that one ended
_INTERRUPTED = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "ended by SIGTERM",
    signal.SIGHUP: "ended by SIGHUP (its terminal was closed)",
}


def run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse, run, and turn every error into a sentence and an exit code.

    2 is for usage, 3 for a gate, 130 for Ctrl-C, 143 for SIGTERM and 129 for SIGHUP, 1 for any other failure.
    """
    options = parser.parse_args(arguments)
    action: Callable[[argparse.Namespace], int] = options.action
    received = [signal.SIGINT]
    try:
        with _ended_as_by_control_c(received):
            expand_places(options)
            return action(options)
    except KeyboardInterrupt as interruption:
        left = f": {interruption}" if str(interruption) else ""  # said by what has something on the disk
        return _fail(options, f"{_INTERRUPTED[received[-1]]}{left}", SIGNALLED + received[-1])
    except ImportError as error:
        if not _interrupted(error):
            raise
        return _fail(options, _INTERRUPTED[received[-1]], SIGNALLED + received[-1])
    except BrokenPipeError:
        return 1
    except PtqError as error:
        code = 3 if isinstance(error, GateError) else 2 if isinstance(error, ConfigError) else 1
        return _fail(options, _with_notes(str(error), error), code)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        first = str(error).partition("\n")[0]
        # Notes are of an evaluation, whose memory no key of the calibration changes.
        advice = ("free some" if getattr(error, "__notes__", ()) else "lower calibration.batch_size or "
                  "calibration.samples, or set refine.model_steps to 0")  # fmt: skip
        return _fail(options, _with_notes(f"out of memory ({first}): {advice}", error), 1)
    except OSError as error:
        if error.errno == errno.EIO and signal.SIGHUP in received:  # of a terminal that was closed
            return SIGNALLED + signal.SIGHUP
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(options, _with_notes(f"the disk is full ({error}): free space or write elsewhere", error), 1)
        return _fail(options, _with_notes(f"a file could not be read or written: {error}", error), 1)


def _interrupted(error: BaseException | None) -> bool:
    """Modules in C that were being loaded say it as an ImportError, and transformers makes another one of that."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _with_notes(message: str, error: Exception) -> str:
    """What a run leaves on the disk is noted on its error."""
    return "; ".join([message, *getattr(error, "__notes__", ())])


@contextmanager
def _ended_as_by_control_c(received: list[signal.Signals]) -> Iterator[None]:
    """Signals of schedulers and closed terminals leave nothing half-written either.

    After the first one has been noticed, the same one again ends at once, and the other kind does nothing: some send
    both. What the caller has set for them stays, as nohup's; and this is for the main thread, as are signals.
    """

    def interrupt(number: int, _: object) -> None:
        received.append(signal.Signals(number))
        for each in ours:
            if signal.getsignal(each) == interrupt:
                signal.signal(each, signal.SIG_DFL if each == number else signal.SIG_IGN)
        raise KeyboardInterrupt

    ours = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    for each in ours:
        signal.signal(each, interrupt)
    try:
        yield
    finally:
        for each in ours:
            if signal.getsignal(each) in (interrupt, signal.SIG_IGN):
                signal.signal(each, signal.SIG_DFL)


def _is_out_of_memory(error: Exception) -> bool:
    """torch says so with a class of its own on GPUs and with a plain RuntimeError on CPUs."""
    said = ("can't allocate memory", "could not create a primitive")  # the second one is oneDNN's
    named = type(error).__name__ == "OutOfMemoryError" or any(each in str(error) for each in said)
    return named or isinstance(error, MemoryError)


def printable(text: str) -> str:
    """Text on one line, with escapes for what moves a cursor or turns the direction: it may quote any file.

    What joins letters in many languages, and a tab, is let through.
    """
    line = " ".join(text.splitlines())
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char).startswith("C") and char not in JOINING
        else char
        for char in line
    )


def _fail(options: argparse.Namespace, message: str, code: int) -> int:
    message = printable(message)
    if options.debug:
        traceback.print_exc()
    ranks = getattr(options, "ranks", None)  # the processes that share a run
    if ranks is None or ranks.speaks():
        with suppress(OSError):  # of a terminal that was closed
            print(f"ptq: {message if ranks is None else ranks.said(message)}", file=sys.stderr)
    return code
