#!/usr/bin/env bash
# Proves the GPU path on this machine, in under nine minutes, and writes what it found as one JSON file (docs/gpu.md).
#   bash benchmarks/gpu.sh --out gpu.json
#   bash benchmarks/gpu.sh --wheels DIR              packages that are missing here come from these wheels
#   bash benchmarks/gpu.sh --device cpu --quick      the same stages on a CPU, in tiny: that nothing is missing
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
exec "$python" -m benchmarks.gpu "$@"
