"""An emulation of the CUDA model, so that kernels run where there is no GPU. Start reading in build.py."""

from .build import Library, SimtError, Struct, address, compile, empty, patch, prepare, written

__all__ = ["Library", "SimtError", "Struct", "address", "compile", "empty", "patch", "prepare", "written"]
