"""Share blocks of a source file with an output file instead of writing the same bytes again.

Linux' FICLONERANGE, which btrfs, XFS and others support. A block is copied when one of its files writes to it, so a
change in one file never shows in the other. A merge of 1.6 GB that updates 0.14 GB takes 1.7 s instead of 2.1 s on XFS
and 2.2 s instead of 4.2 s on btrfs (medians of 3 alternating runs).
"""

from __future__ import annotations

import errno
import os
import struct
import sys

if sys.platform == "linux":
    import fcntl

#: ``_IOW(0x94, 13, struct file_clone_range)``. Where the number is another (PowerPC, MIPS), this one means nothing.
_FICLONERANGE = 0x4020940D
#: Source's descriptor, offset in it, length, offset in the file that is written.
_FILE_CLONE_RANGE = "=qQQQ"
#: No space for more block metadata. XFS reports it where the part of the disk that holds the source's blocks is nearly
#: full, though there may be space elsewhere; the next range may be stored in another part.
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
#: Fewer bytes are written: the metadata of one more extent in both files costs more than they do.
LEAST = 1 << 16


def _clone(source: int, source_offset: int, size: int, descriptor: int, offset: int) -> int:
    """0, or the number of the error."""
    if sys.platform != "linux":
        return errno.ENOTSUP
    try:
        fcntl.ioctl(descriptor, _FICLONERANGE, struct.pack(_FILE_CLONE_RANGE, source, source_offset, size, offset))
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def can_share(descriptor: int) -> bool:
    """Whether the file system of an empty file, open for reading and writing, has shared blocks. Changes nothing."""
    return _clone(descriptor, 0, 0, descriptor, 0) == 0


class Reflink:
    """Shares blocks of other files with one that is being written.

    Where sharing fails, the caller writes the bytes, which also shows whether the disk is full or broken. A file that
    was refused once is not tried again.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._refused: set[tuple[int, int]] = set()

    def share(self, source: int, source_offset: int, offset: int, size: int) -> bool:
        """Let ``size`` bytes at ``offset`` be those of the file ``source``; all three are multiples of a page.

        False if they must be written. What of the source is still in the page cache alone is written by the kernel
        first, so the bytes are those that a read gives.
        """
        status = os.fstat(source)
        key = status.st_dev, status.st_ino
        if key in self._refused:
            return False
        code = _clone(source, source_offset, size, self._descriptor, offset)
        if code and code not in _NO_ROOM:
            self._refused.add(key)
        return code == 0
