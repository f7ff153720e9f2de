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

from emu_jax.buckets import is_transient, transient_error
from emu_jax.errors import EXIT_AGAIN, EXIT_CRASH, EXIT_INTERRUPTED, CommandError

# What a disk answers when it is full, over its quota or limit, broken, or read-only since it broke.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code of a command that `error` ends, and its line; "" where a traceback has to tell.

    >>> from emu_jax.errors import UserError
    >>> ending(UserError("steps=0; expected at least 1"))
    (2, 'steps=0; expected at least 1')
    >>> ending(OSError(errno.ENOSPC, "No space left on device", "runs/mini/metrics.jsonl"))
    (75, 'runs/mini/metrics.jsonl: No space left on device; mend that, then run it again')
    >>> ending(KeyError("x"))
    (1, '')
    """
    if isinstance(error, CommandError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return EXIT_AGAIN, f"{error.filename or 'writing a file'}: {error.strerror}; mend that, then run it again"
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if is_transient(error):
        return EXIT_AGAIN, str(transient_error(error))
    return EXIT_CRASH, ""
