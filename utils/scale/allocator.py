"""Memory that the C library gives to tensors on the CPU."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Have the C library keep what tensors free, up to 1 GiB, for the next ones. By default it goes
    back to the kernel, which clears every page again for the next micro-batch: about a tenth of an
    update's time. Does nothing where the library is not glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        # M_MMAP_THRESHOLD: activations of small models, but not logits, which would leave holes
        libc.mallopt(-3, 2**23)
