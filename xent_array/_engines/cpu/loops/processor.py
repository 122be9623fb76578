"""The processor of this machine, as LLVM knows it."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import Any

from llvmlite import binding


@cache
def triple() -> str:
    """Architecture and system, for example "x86_64-unknown-linux-gnu"."""
    return str(binding.get_process_triple())


@cache
def name() -> str:
    return str(binding.get_host_cpu_name())


@cache
def features() -> str:
    """What it has beyond its name, by LLVM's names."""
    return str(binding.get_host_cpu_features().flatten())


def has_feature(feature: str) -> bool:
    return f"+{feature}" in features().split(",")


def is_x86() -> bool:
    return triple().startswith("x86_64")


def is_arm() -> bool:
    return triple().startswith(("aarch64", "arm64"))


@cache
def target_machine() -> Any:
    """What LLVM compiles for."""
    with suppress(RuntimeError):  # newer versions do it by themselves, and raise
        binding.initialize()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    relocation = "static" if is_x86() else "default"
    target = binding.Target.from_triple(triple())
    return target.create_target_machine(cpu=name(), features=features(), opt=3, reloc=relocation, jit=True)
