#!/usr/bin/env bash
# Sets everything up and runs the tests, a process per core up to four.
#   bash scripts/test.sh                                     all tests
#   bash scripts/test.sh fast                                those that start no run and no vLLM
#   bash scripts/test.sh tests/kernels -k power              arguments go to pytest
#   bash scripts/test.sh -n 0 tests/trainers/test_run.py     in one process
set -euo pipefail
onstream_tests=test . "$(dirname "$0")/setup.sh"
if [ "${1:-}" = fast ]; then
    shift
    set -- -m "not slow and not gpu" "$@"
fi
workers=$(($(nproc) < 4 ? $(nproc) : 4))
export OMP_NUM_THREADS=$(($(nproc) / workers))
exec python -m pytest -n "$workers" --dist loadfile "$@"
