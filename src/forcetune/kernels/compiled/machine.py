"""Machine code for this processor: compiled by LLVM once, and stored on disk for later runs."""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from forcetune.kernels.compiled.assembly import REALS, Target
from forcetune.utils.files import cache_folder

OLDEST_LLVM = 20
"""That of llvmlite 0.45, which needs no call to be initialised."""

_LOCK = threading.RLock()


@functools.cache
def llvm() -> Any:
    """llvmlite's binding to LLVM, or None where it is not installed or too old."""
    try:
        import llvmlite.binding as binding

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        return binding if binding.llvm_version_info[0] >= OLDEST_LLVM else None
    except (ImportError, OSError, RuntimeError):
        return None


@functools.cache
def _host() -> tuple[str, str]:
    """Name and features of this processor."""
    binding = llvm()
    try:
        return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM does not know the features of every platform
        return binding.get_host_cpu_name(), ""


@functools.cache
def target(dtype: str) -> Target:
    """Of this processor, for ``float64`` or ``float32``."""
    features = _host()[1].split(",")
    size = 8 if dtype == "float64" else 4
    if "+avx512f" in features:
        return Target(REALS[dtype], 64 // size, 32)
    if "+avx" in features:
        return Target(REALS[dtype], 32 // size, 16)
    # 16 bytes everywhere else; pairs of registers hide the latency of arithmetic
    return Target(REALS[dtype], 16 // size, 16 if "+sse2" in features else 32)


class Machine:
    """Functions of one compiled module."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def address(self, name: str) -> int:
        return int(self._engine.get_function_address(name))


_MACHINES: dict[str, Machine] = {}


def _new_lock() -> None:
    # a forked process may have got the lock from a thread that it has not
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


def compiled(key: str, write: Callable[[], str]) -> Machine:
    """The module that ``write`` returns the text of, from memory, from disk, or compiled now.

    Args:
        key: names what is written, and changes with whatever writes it.
        write: is called only where there is none.
    """
    with _LOCK:
        machine = _MACHINES.get(key)
        if machine is None:
            machine = _MACHINES[key] = _load(key, write)
        return machine


def _load(key: str, write: Callable[[], str]) -> Machine:
    binding = llvm()
    path = _place(key)
    code = _read(path)
    if code is None:
        module = binding.parse_assembly(write())
        module.verify()
        code = _machine().emit_object(module)
        _write(path, code)
    # the engine owns its machine
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Machine(engine)


def _machine() -> Any:
    binding = llvm()
    name, features = _host()
    triple = binding.Target.from_triple(binding.get_process_triple())
    return triple.create_target_machine(cpu=name, features=features, opt=3, reloc="default", codemodel="jitdefault")


def _place(key: str) -> Path:
    binding = llvm()
    parts = (key, *_host(), binding.get_process_triple(), str(binding.llvm_version_info))
    return cache_folder("kernels") / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.o"


def _read(path: Path) -> bytes | None:
    """Code on disk, unless it is damaged: behind it stands its hash."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code, digest = content[:-32], content[-32:]
    return code if code and hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Keep code for later runs, where that is possible."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(code + hashlib.sha256(code).digest())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@functools.cache
def source_hash(*paths: str) -> str:
    """Of the files that write a module, so that code of other versions is not used."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()
