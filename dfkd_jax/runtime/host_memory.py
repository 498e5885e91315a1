"""Let a CPU run keep the memory it frees.

XLA's CPU runtime allocates the buffers of every call anew. glibc returns large freed blocks to the
operating system and pays for fresh, zeroed pages at the next call: for steps of a few milliseconds
that is more than half of the time. Telling it to keep them costs no more memory than the peak.
"""

import ctypes
import sys

# Numbers of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Ask glibc not to return freed memory to the system; False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = {
        _M_MMAP_MAX: 0,  # large blocks come from the heap too
        _M_TRIM_THRESHOLD: 2**31 - 1,
        _M_TOP_PAD: 512 * 2**20,  # grow rarely; pages never touched cost nothing
    }
    return all([mallopt(name, value) == 1 for name, value in settings.items()])
