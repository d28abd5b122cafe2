"""Compiles bench/sync.cu with nvcc, runs it, and writes what it measured: `python -m bench.sync OUT.json`.

{"schema": 1, "device": {…}, "date": …, "commit": …, "rows": [{"name": "flags", "blocks": 132, "us": …}, …]};
what the names mean stands in sync.cu. Exits 3 on a machine without a CUDA device, after compiling.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from bench.machine import ROOT, commit

NO_DEVICE = 3


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [os.path.join(home, "bin") for home in homes if home]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(places))


def compile_program(nvcc: str, program: pathlib.Path, archs: Sequence[str]) -> None:
    """archs: "80", "90a", … as code; raises CalledProcessError with the compiler's words in its output."""
    command = [nvcc, "-std=c++17", "-O3", "-I", str(ROOT / "csrc"), str(ROOT / "bench" / "sync.cu")]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    subprocess.run([*command, "-o", str(program)], check=True, text=True, stdout=-1, stderr=subprocess.STDOUT)


def document(lines: str) -> dict[str, object]:
    """The JSON of the program's output."""
    rows = [json.loads(line) for line in lines.splitlines()]
    device = next(row for row in rows if row["name"] == "device")
    rows.remove(device)
    del device["name"]
    now = datetime.datetime.now(datetime.timezone.utc)
    facts = {"schema": 1, "device": device, "date": now.strftime("%Y-%m-%dT%H:%MZ"), **commit()}
    return facts | {"rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.sync", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    options = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("sync: needs nvcc, which is neither on PATH nor in CUDA_HOME", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "sync"
        try:
            compile_program(nvcc, program, ("80", "90a"))
        except subprocess.CalledProcessError as error:
            print(error.stdout, file=sys.stderr)
            return 1
        print("sync: compiled", flush=True)
        done = subprocess.run([str(program)], text=True, stdout=subprocess.PIPE)
    if done.returncode:
        return done.returncode
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = document(done.stdout)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
