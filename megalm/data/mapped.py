"""Files mapped into memory for reading, without keeping a descriptor open for each.

Python's mmap keeps a descriptor as long as the map lives, and so does numpy's memmap. A blend of 2,000 corpora maps
10,000 files, while a process may often have no more than 1,024 descriptors; maps it may have 65,530. Small files are
read instead, which takes neither.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SMALL_BYTES = 1 << 14
_FAILED = ctypes.c_void_p(-1).value


def map_file(path: str | Path) -> npt.NDArray[np.uint8]:
    """The bytes of a file, read-only, mapped for as long as the array or a view of it lives.

    Raises: OSError if the file cannot be opened or mapped.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        num_bytes = os.fstat(descriptor).st_size
        if num_bytes <= SMALL_BYTES:
            return np.frombuffer(os.read(descriptor, num_bytes), np.uint8)
        return _map(descriptor, num_bytes, str(path))
    finally:
        os.close(descriptor)


def map_array(path: str | Path) -> npt.NDArray[Any]:
    """The array of a `.npy` file, mapped.

    Raises: OSError as `map_file`; ValueError if the file is cut off, no `.npy` file, or holds objects.
    """
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"version {version} of the npy format is not read")
        try:
            shape, is_fortran, dtype = readers[version](file)
        except Exception as error:  # numpy lets errors of its parsers through, whose kinds it does not promise
            raise ValueError(f"its header is damaged: {error}") from error
        start = file.tell()
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which are not read")
    if is_fortran and len(shape) > 1:
        raise ValueError("it is stored by columns")
    raw = map_file(path)
    stop = start + dtype.itemsize * math.prod(shape)
    if stop != len(raw):
        raise ValueError(f"it has {len(raw)} bytes, its header says {stop}")
    return raw[start:stop].view(dtype).reshape(shape)


def _map(descriptor: int, num_bytes: int, path: str) -> npt.NDArray[np.uint8]:
    library = _library()
    address = library.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    buffer = (ctypes.c_ubyte * num_bytes).from_address(address)
    # Threads may still read while the interpreter ends; the operating system takes the map back then.
    weakref.finalize(buffer, library.munmap, address, num_bytes).atexit = False
    return np.frombuffer(memoryview(buffer).toreadonly(), np.uint8)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,  # off_t of every 64-bit system
    )
    library.munmap.restype = ctypes.c_int
    library.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return library
