#!/usr/bin/env bash
# Sets everything up and runs the tests; arguments go to pytest:
#   bash scripts/test.sh tests/kernels -k power
set -euo pipefail
. "$(dirname "$0")/setup.sh"
exec python -m pytest "$@"
