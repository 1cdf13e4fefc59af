#!/usr/bin/env bash
# Sets everything up and runs the tests, a process per core up to four; arguments go to pytest:
#   bash scripts/test.sh tests/kernels -k power
#   bash scripts/test.sh -n 0 tests/trainers/test_run.py     in one process
set -euo pipefail
onstream_tests=test . "$(dirname "$0")/setup.sh"
workers=$(($(nproc) < 4 ? $(nproc) : 4))
export OMP_NUM_THREADS=$(($(nproc) / workers))
exec python -m pytest -n "$workers" --dist loadfile "$@"
