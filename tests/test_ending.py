"""The exit code and the last line of a command, by the error that ends it."""

import errno
import os

import pytest

from emu_jax.ending import ending
from emu_jax.errors import EXIT_AGAIN, UserError


def refused(number: int) -> UserError:
    """As commands refuse a folder that they cannot write to."""
    try:
        try:
            raise OSError(number, os.strerror(number), "out")
        except OSError as error:
            raise UserError(f"out: cannot be written ({error.strerror}); name another folder") from error
    except UserError as error:
        return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_passes_also_where_a_command_starts(number):
    code, line = ending(refused(number))
    assert code == EXIT_AGAIN
    assert line == f"out: cannot be written ({os.strerror(number)}); name another folder, or make room and run it again"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_folder_that_nobody_may_write_to_does_not(number):
    assert ending(refused(number)) == (2, f"out: cannot be written ({os.strerror(number)}); name another folder")
