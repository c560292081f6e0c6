"""Build of the one thing that is not Python: the extensions. All else is in pyproject.toml.

FASTTUN_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`);
FASTTUN_ANNOTATE=1 writes Cython's annotated HTML beside the generated C, under build/.
"""

import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError, PlatformError

SANITIZE = os.environ.get("FASTTUN_SANITIZE") == "1"
ANNOTATE = os.environ.get("FASTTUN_ANNOTATE") == "1"

COMPILE_ARGS = ["-O3", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unused-function"]
LINK_ARGS = []
if SANITIZE:
    COMPILE_ARGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-strict-aliasing",
                    "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    LINK_ARGS = ["-fsanitize=address,undefined"]

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False, "wraparound": False, "initializedcheck": False,
    "cdivision": True, "embedsignature": False, "freethreading_compatible": True,
}

HINT = """
fasttun's C extension did not build.
  It needs Linux, a C compiler, Python's headers and those of OpenSSL 3:
    Debian, Ubuntu   apt-get install gcc libc6-dev python3-dev libssl-dev
    Fedora           dnf install gcc python3-devel kernel-headers openssl-devel
    Alpine           apk add gcc musl-dev python3-dev linux-headers openssl-dev
  The compiler said: {reason}
"""


class BuildExtension(build_ext):
    """`build_ext` that runs Cython only when it builds, and ends a failure with what to install.

    Cython writes below `build_temp`, so neither the source tree nor an sdist ever holds generated C.
    """

    def build_extension(self, ext):
        from Cython.Build import cythonize  # not at the top: an sdist needs no Cython

        (generated,) = cythonize([ext], build_dir=self.build_temp, annotate=ANNOTATE, force=self.force,
                                 quiet=self.verbose < 1, compiler_directives=DIRECTIVES)
        ext.sources, ext.depends = generated.sources, generated.depends
        ext.include_dirs = generated.include_dirs
        try:
            super().build_extension(ext)
        except (CompileError, LinkError, PlatformError, OSError) as error:
            raise SystemExit(HINT.format(reason=error)) from error


def extensions():
    return [
        Extension(f"fasttun.{name}", [f"fasttun/{name}.pyx"], include_dirs=[".", "fasttun"], libraries=["crypto"],
                  extra_compile_args=COMPILE_ARGS, extra_link_args=LINK_ARGS)
        for name in ("_core", "_testing")
        if os.path.exists(f"fasttun/{name}.pyx")
    ]


if not sys.platform.startswith("linux"):
    raise SystemExit("fasttun builds on Linux only: its loop speaks to Linux's TUN driver.")

setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
