"""Calls CMake for the compiled part; sources and flags are in CMakeLists.txt, the rest in pyproject.toml.

SEQKERN_EXTENSION=off leaves the compiled part out. Without CMake or a C++ compiler it is left out too, and
the install succeeds: the package then runs on its eager backend and says so.
SEQKERN_TORCHES=DIR:DIR:... has an extension built for the torch in each of these folders (`make wheel`),
instead of for the one that is installed.
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

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent.resolve()
# Kept between builds, so that the next one compiles only what changed: for another torch, its side.
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
COMPILED = ("_C*.so", "libseqkern_kernels.so")


def tool(name: str) -> str | None:
    """The program beside this Python (installed by pip), else the one on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


class CMakeBuild(build_ext):
    built = False

    def build_extension(self, ext: Extension) -> None:
        self.output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        self.output.mkdir(parents=True, exist_ok=True)
        remove_compiled(self.output)  # an earlier build's
        why_not = self.configure_and_build()
        self.built = why_not is None
        if why_not:
            remove_compiled(self.output)  # of several, those that were built
            line = "=" * 100
            message = f"seqkern is installed without its compiled kernels (eager backend only): {why_not}"
            print(f"{line}\n{message}\n{line}", file=sys.stderr)

    def configure_and_build(self) -> str | None:
        """None when built; else why this machine cannot build. Raises when it can and the build fails."""
        if os.environ.get("SEQKERN_EXTENSION", "").lower() in ("0", "off", "no"):
            return "SEQKERN_EXTENSION=off"
        cmake, ninja = tool("cmake"), tool("ninja")
        if not cmake or not ninja:
            return "it takes cmake and ninja to build them"
        torches = os.environ.get("SEQKERN_TORCHES", "")
        if not torches and importlib.util.find_spec("torch") is None:
            return "torch is not there to build against: install with --no-build-isolation"
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", "--log-level=STATUS"),
            *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"),
            f"-DSEQKERN_OUTPUT_DIR={self.output}",
        ]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        for number, torch in enumerate(torches.split(os.pathsep)):
            suffix = f"_{number}" if torch else ""
            environment = {**os.environ, "PYTHONPATH": os.path.abspath(torch)} if torch else None
            if subprocess.run([*configure, f"-DSEQKERN_MODULE_SUFFIX={suffix}"], env=environment).returncode:
                return "CMake found no way to build them here; its message is above"
            subprocess.run([cmake, "--build", str(BUILD), "--parallel", jobs], env=environment, check=True)
        return None

    def copy_extensions_to_source(self) -> None:
        """Of an editable install."""
        package = ROOT / "seqkern"
        remove_compiled(package)
        for pattern in COMPILED:
            for file in self.output.glob(pattern):
                shutil.copy2(file, package)


class Wheel(bdist_wheel):
    def write_wheelfile(self, folder: str, *args: object, **options: object) -> None:
        """Adds the bill of materials (PEP 770)."""
        super().write_wheelfile(folder, *args, **options)
        if self.distribution.get_command_obj("build_ext").built:
            bills = Path(folder) / "sboms"
            bills.mkdir()
            shutil.copy(BUILD / "generated" / "sbom.cdx.json", bills / "seqkern.cdx.json")


def remove_compiled(folder: Path) -> None:
    for pattern in COMPILED:
        for file in folder.glob(pattern):
            file.unlink()


setup(
    ext_modules=[Extension("seqkern._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
