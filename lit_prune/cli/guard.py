"""How a command ends: one line and a code for what the user can mend, a traceback for a bug."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from lit_prune.errors import UserError

OK, BUG, USER_ERROR, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
_FULL = {errno.ENOSPC: "disk full", errno.EFBIG: "file too large", errno.EDQUOT: "quota exceeded"}
# Writers in Rust and C++ hand on the same failures as text only.
_FULL_TEXTS = ("No space left on device", "os error 28", "os error 27", "os error 122")
#: What torch's allocator on the CPU says, in a RuntimeError.
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
#: What torch.distributed raises and says where another process is gone.
_LOST_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError"}
_LOST_TEXTS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
_PATIENCE = 3.0


class Terminated(SystemExit):
    """SIGTERM came, and what could be saved is saved."""


class Termination:
    """What SIGTERM does: end the command at once, or wait for a place where it can be saved.

    Attributes:
        deferred: Whether it waits.
        asked: Whether it came.
        resumes: Whether the command can go on from a checkpoint.
    """

    def __init__(self) -> None:
        self.deferred, self.asked, self.resumes = False, False, False

    def arm(self) -> Any:
        """Take the signal over; returns what it did before, or None outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return None
        return signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: Any) -> None:
        self.asked = True
        if not self.deferred:
            raise Terminated(TERMINATED)


#: Of this process.
termination = Termination()


def is_rank_zero() -> bool:
    """Tell whether this process is the first of its run, before any process group exists."""
    env = os.environ
    if "RANK" in env:
        return int(env["RANK"]) == 0
    names = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(int(env.get(name) or 0) == 0 for name in names)


def say(message: str) -> None:
    """Print one line on stderr."""
    sys.stderr.write(f"lit-prune: {' '.join(message.split())}\n")
    sys.stderr.flush()


def guarded(action: Callable[[], None], *, resumes: bool = False) -> int:
    """Run a command and turn whatever it raises into an exit code.

    Args:
        action: The command.
        resumes: Whether it can go on from a checkpoint, which is then said when it is interrupted.

    Returns:
        0, or 2 after one line about a mistake of the user's, 130 or 143 when it was interrupted or
        terminated, 1 after the traceback of anything else.
    """
    parent = os.getppid()
    termination.deferred, termination.asked, termination.resumes = False, False, resumes
    before = termination.arm()
    try:
        return _ended(action, parent)
    except Terminated as end:  # on its way out
        return _exit_code(end)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _ended(action: Callable[[], None], parent: int) -> int:
    try:
        action()
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as end:
        return _exit_code(end)
    except BrokenPipeError:  # who read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except BaseException as error:
        message = user_message(error)
        if message is None:
            if termination.asked and int(os.environ.get("WORLD_SIZE") or 1) > 1:
                return _terminated()  # another process ended, and this one lost the connection
            silent = _connection_lost(error) and not is_rank_zero() and _parent_ended(parent)
            if not silent:
                traceback.print_exc()
            return BUG
        if is_rank_zero() or not _parent_ended(parent):
            say(f"error: {message}")
        return USER_ERROR
    return OK


def user_message(error: BaseException) -> str | None:
    """Find what the user can be told instead of a traceback.

    Args:
        error: Anything raised.

    Returns:
        The message, or None for a bug.
    """
    for link in causes(error):
        if isinstance(link, UserError):
            return str(link)
        # By name: this module must not import Lightning.
        if any(base.__name__ == "MisconfigurationException" for base in type(link).__mro__):
            return str(link)
        found = _disk_full(link) or _out_of_memory(link)
        if found is not None:
            return found
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Go from an exception to those that it was raised from.

    Args:
        error: The exception.

    Yields:
        It, and its causes.
    """
    while error is not None:
        yield error
        error = error.__cause__


def _disk_full(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _FULL:
        what, name = _FULL[error.errno], error.filename
    elif any(text in str(error) for text in _FULL_TEXTS):
        what, name = "disk full", None
    else:
        return None
    where = f"while writing {name}" if name else f"while writing ({error})"
    return f"{what} {where}: free some space or choose another --trainer.default_root_dir"


def _out_of_memory(error: BaseException) -> str | None:
    names = {base.__name__ for base in type(error).__mro__}
    if not names & {"MemoryError", "OutOfMemoryError"} and _NO_MEMORY not in str(error):
        return None
    first = str(error).partition("\n")[0]
    return (
        f"out of memory ({first[:120]}): lower --data.batch_size or --data.length, or set "
        "--model.gradient_checkpointing true"
    )


def _connection_lost(error: BaseException) -> bool:
    """Tell whether another process ended while this one, itself in order, waited for it."""
    return any(
        any(base.__name__ in _LOST_TYPES for base in type(link).__mro__)
        or any(text in str(link) for text in _LOST_TEXTS)
        for link in causes(error)
    )


def _exit_code(end: SystemExit) -> int:
    if isinstance(end.__context__, KeyboardInterrupt):  # Lightning's answer to Ctrl-C
        return _interrupted()
    if isinstance(end, Terminated) or type(end).__name__ == "SIGTERMException":
        return _terminated()
    if end.code is None or isinstance(end.code, int):
        return end.code or OK
    say(str(end.code))
    return BUG


def _terminated() -> int:
    if not is_rank_zero():
        return OK  # Lightning kills the first process when another one ends with a code
    hint = "; an interrupted run goes on with --ckpt_path last" if termination.resumes else ""
    say(f"terminated{hint}")
    return TERMINATED


def _interrupted() -> int:
    if is_rank_zero():
        hint = "a run that has a checkpoint goes on with --ckpt_path last"
        say(f"interrupted; {hint}" if termination.resumes else "interrupted")
    return INTERRUPTED


def _parent_ended(parent: int) -> bool:
    """Wait for the launching process: if it failed too it has said why, once is enough."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if os.getppid() != parent:
            return True
        time.sleep(0.05)
    return False
