"""How a command ends: its exit code, and its last line.

0     it has done what was asked
1     a crash, with a traceback
2     an error of the user's
69    a process of a training job was lost or hung (EX_UNAVAILABLE of sysexits.h); the same command resumes
70    the training diverged (EX_SOFTWARE)
75    it stopped for a reason that passes (EX_TEMPFAIL): SIGTERM, storage that does not answer, a full disk, a killed
      input worker; the same command resumes
130   Ctrl-C
"""

from __future__ import annotations

import errno
import os
import re

from emu_jax.buckets import is_transient, transient_error
from emu_jax.errors import EXIT_AGAIN, EXIT_CRASH, EXIT_INTERRUPTED, CommandError

# What a disk answers when it is full, over its quota or limit, broken, or read-only since it broke.
FULL = (errno.ENOSPC, errno.EDQUOT)
DISK_ERRORS = (*FULL, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
_DISK_WORDS = re.compile("|".join(os.strerror(number) for number in DISK_ERRORS))
_QUOTED = re.compile(r'"([^"]+)"')


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code of a command that `error` ends, and its line; "" where a traceback has to tell.

    >>> from emu_jax.errors import UserError
    >>> ending(UserError("steps=0; expected at least 1"))
    (2, 'steps=0; expected at least 1')
    >>> ending(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"))
    (75, 'metrics.jsonl: No space left on device; make room or mend the disk, then run it again')
    >>> ending(KeyError("x"))
    (1, '')
    """
    if isinstance(error, CommandError):
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in FULL:  # nothing can be written there yet
            return EXIT_AGAIN, f"{error}, or make room and run it again"
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    disk = _disk_failure(error)
    if disk:
        return EXIT_AGAIN, f"{disk}; make room or mend the disk, then run it again"
    if is_transient(error):
        return EXIT_AGAIN, str(transient_error(error))
    return EXIT_CRASH, ""


def _disk_failure(error: BaseException) -> str:
    """Which file a disk has refused to write, and why; "" for other errors."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in DISK_ERRORS:
            return f"{seen.filename or 'a file that was being written'}: {seen.strerror}"
        words = _DISK_WORDS.search(str(seen))
        if words:  # TensorStore's errors have no number
            file = _QUOTED.search(str(seen), endpos=words.start())
            return f"{file[1] if file else 'a file that was being written'}: {words[0]}"
        seen = seen.__cause__ or seen.__context__
    return ""
