"""Builds the CUDA kernels with nvcc at first use and loads them.

One library per (bits, runs per scale, type of x), kept in `$XDG_CACHE_HOME/rosaq` under a name that holds a hash of the sources, so that a changed
source is built anew. A build takes some seconds and happens once per machine.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-gencode=arch=compute_90a,code=sm_90a")


def nvcc() -> str | None:
    """Path of nvcc: `$CUDA_HOME/bin`, the search path, or /usr/local/cuda/bin."""
    home = os.environ.get("CUDA_HOME")
    places = [Path(home, "bin", "nvcc")] if home else []
    found = shutil.which("nvcc")
    places += [Path(found)] if found else []
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((str(place) for place in places if place.exists()), None)


def cached(bits: int, group_runs: int, bf16: int) -> Path:
    """Where the library for these constants is kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rosaq")
    return folder / f"rosaq-sm90a-w{bits}-r{group_runs}-{'bf16' if bf16 else 'fp16'}-{_source_hash()}.so"


def why_not(bits: int, group_runs: int, bf16: int) -> str | None:
    """None where the library is built already or can be."""
    if nvcc() is None and not cached(bits, group_runs, bf16).exists():
        return "nvcc was not found ($CUDA_HOME/bin, the search path, /usr/local/cuda/bin) and no earlier build is in the cache"
    return None


def build(bits: int, group_runs: int, bf16: int) -> Path:
    """Build unless it is there.

    Raises:
        RuntimeError: nvcc failed; its message is included.
    """
    target = cached(bits, group_runs, bf16)
    if target.exists():
        return target
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError(str(why_not(bits, group_runs, bf16)))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch, target.name)
        defines = (f"-DROSAQ_BITS={bits}", f"-DROSAQ_GROUP_RUNS={group_runs}", f"-DROSAQ_BF16={bf16}")
        command = [compiler, *FLAGS, *defines, "-o", str(made), str(SOURCES / "kernels.cu")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}{done.stdout}")
        os.replace(made, target)  # whole or not at all, also when two processes build at once
    return target


def build_all(wanted: list[tuple[int, int, int]], jobs: int | None = None) -> list[Path]:
    """Build several libraries side by side."""
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        return list(pool.map(lambda constants: build(*constants), wanted))


@lru_cache(maxsize=64)
def load(bits: int, group_runs: int, bf16: int) -> ctypes.CDLL:
    """The library for these constants, built if need be."""
    return ctypes.CDLL(str(build(bits, group_runs, bf16)))


@lru_cache(maxsize=1)
def _source_hash() -> str:
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
