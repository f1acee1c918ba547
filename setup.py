"""Builds the object that is preloaded into swtpm; everything else is in setup.cfg."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup


def variable(name: str) -> str:
    """One of the interpreter's own build variables."""
    return str(sysconfig.get_config_var(name) or "")


def check_interpreter() -> None:
    """The object embeds this interpreter: that takes a shared libpython and the header files."""
    if not sysconfig.get_config_var("Py_ENABLE_SHARED"):
        sys.exit(f"swtpm-prop: {sys.executable} has no shared libpython; build with the system's /usr/bin/python3")
    library = Path(variable("LIBDIR"), variable("LDLIBRARY"))
    headers = Path(sysconfig.get_path("include"), "Python.h")
    for file, package in (
        (headers, "python3-dev"),
        (library, "python3-dev"),
        (Path("/usr/include/libtpms/tpm_library.h"), "libtpms-dev"),
    ):
        if not file.exists():
            sys.exit(f"swtpm-prop: {file} is missing; install {package}")


def preload() -> Extension:
    """``swtpm_prop/emulator/_preload.*.so``; it is preloaded, never imported."""
    return Extension(
        "swtpm_prop.emulator._preload",
        ["swtpm_prop/emulator/preload.c"],
        define_macros=[
            ("_GNU_SOURCE", None),
            ("SWTPM_PROP_STDLIB", f'"{sysconfig.get_path("stdlib", vars=base())}"'),
            ("SWTPM_PROP_DYNLOAD", f'"{variable("DESTSHARED")}"'),
            ("SWTPM_PROP_LIBRARY", f'"{variable("LDLIBRARY")}"'),
        ],
        libraries=[f"python{variable('LDVERSION')}"],
        library_dirs=[variable("LIBDIR")],
        extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden"],
        extra_link_args=["-Wl,-z,now", "-Wl,-z,relro", "-Wl,--no-undefined"],
    )


def base() -> dict[str, str]:
    """A virtual environment's interpreter uses the standard library of the one it was made from."""
    return {"installed_base": sys.base_prefix, "base": sys.base_prefix}


check_interpreter()
setup(ext_modules=[preload()])
