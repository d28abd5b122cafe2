"""Calls CMake for the extension; sources and flags are in CMakeLists.txt, the rest in pyproject.toml.

SEQKERN_EXTENSION=off leaves the extension out. Without CMake or a C++ compiler it is left out too, and the
install succeeds: the package then runs on its eager backend and says so.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def tool(name: str) -> str | None:
    """The program beside this Python (installed by pip), else the one on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        why_not = self.configure_and_build(module.parent)
        if why_not:
            module.unlink(missing_ok=True)  # an earlier build's
            line = "=" * 100
            message = f"seqkern is installed without its compiled kernels (eager backend only): {why_not}"
            print(f"{line}\n{message}\n{line}", file=sys.stderr)

    def configure_and_build(self, output: Path) -> str | None:
        """None when built; else why this machine cannot build. Raises when it can and the build fails."""
        if os.environ.get("SEQKERN_EXTENSION", "").lower() in ("0", "off", "no"):
            return "SEQKERN_EXTENSION=off"
        cmake, ninja = tool("cmake"), tool("ninja")
        if not cmake or not ninja:
            return "it takes cmake and ninja to build them"
        if importlib.util.find_spec("torch") is None:
            return "torch is not there to build against: install with --no-build-isolation"

        # Kept between builds, so that the next one compiles only what changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "--log-level=STATUS"),
            *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"),
            f"-DSEQKERN_OUTPUT_DIR={output}",
        ]
        if subprocess.run(configure).returncode:
            return "CMake found no way to build them here; its message is above"
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        return None


# optional: an editable install copies the module into the source tree only if it was built.
setup(ext_modules=[Extension("seqkern._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
