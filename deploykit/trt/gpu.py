"""Gpu: the NVIDIA GPUs of this machine, asked of the driver itself, so that no package is needed to say there is none."""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: COMPUTE_CAPABILITY_MAJOR, _MINOR (cuda.h)


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name and compute capability."""

    name: str
    major: int
    minor: int

    @property
    def target(self) -> str:
        """Its generation as builds name it: 'sm75' for a T4."""
        return f"sm{self.major}{self.minor}"


@functools.cache
def found() -> tuple[Gpu, ...]:
    """The GPUs that the CUDA driver lists; empty without a driver or a GPU."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    gpus = []
    for ordinal in range(count.value):
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        if driver.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
            continue
        driver.cuDeviceGetName(name, 256, device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
        gpus.append(Gpu(name.value.decode(errors="replace"), major.value, minor.value))
    return tuple(gpus)
