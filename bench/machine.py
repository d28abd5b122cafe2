"""Which machine and which software a number was measured on. Never a host name, a user name or a path."""

from __future__ import annotations

import datetime
import os
import pathlib
import platform
import re
import subprocess
import sys

import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Newest first: the first flag that /proc/cpuinfo has names the instruction set.
INSTRUCTION_SETS = (
    ("amx_bf16", "amx"),
    ("avx512_bf16", "avx512bf16"),
    ("avx512f", "avx512"),
    ("avx2", "avx2"),
    ("asimd", "neon"),
)

QUIET = 0.05  # with more of the cores taken by other processes, a run says so wherever it is shown


def slugify(text: str) -> str:
    """ "AMD EPYC 9B14 96-Core Processor" -> "amd-epyc-9b14-96-core"; trademark signs and clocks go."""
    text = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*$", " ", text, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def describe_cpu(cpuinfo: str) -> dict[str, str]:
    """From /proc/cpuinfo: name, family and model numbers (a name may be as bare as "AMD EPYC"), best ISA."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    isa = next((name for flag, name in INSTRUCTION_SETS if flag in flags), platform.machine())
    name = fields.get("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\s+", " ", re.sub(r"\((R|TM)\)", "", name)).strip()
    cpu = {"model": name, "instruction_set": isa}
    if "cpu family" in fields and "model" in fields:
        cpu |= {"family": fields["cpu family"], "model_number": fields["model"]}
    return cpu


def machine(device: str) -> dict[str, object]:
    """{"device", "slug", "model", …}: stable from run to run on one kind of machine."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {
            "device": "cuda",
            "slug": slugify(properties.name),
            "model": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 2**30),
        }
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    cpu = describe_cpu(cpuinfo.read_text() if cpuinfo.exists() else "")
    numbers = f"family{cpu['family']}-model{cpu['model_number']}-" if "family" in cpu else ""
    slug = f"{slugify(cpu['model'])}-{numbers}{cpu['instruction_set']}"
    return {"device": "cpu", "slug": slug, **cpu, "cores": available_cores()}


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Elsewhere:
    """How busy the cores are with other processes than this one and its children, from its making on.

    Other processes distort ratios: torch.nn, which waits for its threads once a step, suffers most.
    """

    STAT = pathlib.Path("/proc/stat")

    def __init__(self) -> None:
        self.start = self.read() if self.STAT.exists() else None

    def read(self) -> tuple[float, float]:
        """Seconds of all cores: passed, and busy with others."""
        hertz = os.sysconf("SC_CLK_TCK")
        first = self.STAT.read_text().splitlines()[0]
        ticks = [int(field) / hertz for field in first.split()[1:9]]
        own = sum(os.times()[:4])  # user and system, children that have ended included
        return sum(ticks), sum(ticks) - ticks[3] - ticks[4] - own  # 3, 4: idle, waiting for input or output

    def busy(self) -> float | None:
        """Fraction of the cores' time, 0 … 1; None where the system does not tell."""
        if self.start is None:
            return None
        (passed, others), (passed_, others_) = self.start, self.read()
        return round(max(0.0, (others_ - others) / max(1e-9, passed_ - passed)), 3)


def clock_mhz() -> float | None:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    found = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    return round(max(map(float, found))) if found else None


def commit() -> dict[str, object]:
    """{"commit", "dirty"}: dirty when tracked files other than the results differ from the commit."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!README.md")
    return {
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }


def software() -> dict[str, object]:
    """Versions of what takes part, and what seqkern's extension says of itself (no paths)."""
    import seqkern
    from seqkern import _extension

    config = torch.__config__.show()
    versions: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__}
    for name, pattern in (("onednn", r"MKL-DNN v([\d.]+)"), ("mkl", r"Math Kernel Library Version ([\d.]+)")):
        found = re.search(pattern, config)
        versions[name] = found.group(1) if found else None
    if torch.version.cuda:
        versions |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    versions["seqkern"] = seqkern.__version__
    if _extension.AVAILABLE:
        built = {key: str(value) for key, value in _extension._C.build_info().items()}
        versions["build"] = {
            key: value for key, value in built.items() if "/" not in value and "\\" not in value
        }
        versions["instruction_set"] = _extension._C.instruction_set()
    else:
        versions["instruction_set"] = None  # eager only
    return versions


def run_facts(device: str, threads: int, limits: dict[str, object]) -> dict[str, object]:
    """What belongs to one run: when, which commit, versions, threads, what the machine can do."""
    now = datetime.datetime.now(datetime.timezone.utc)
    facts: dict[str, object] = {"date": now.strftime("%Y-%m-%dT%H:%MZ"), **commit()}
    facts |= {"device": device, "threads": threads, "platform": sys.platform, "software": software()}
    facts |= {"clock_mhz": clock_mhz(), "limits": limits}
    return facts
