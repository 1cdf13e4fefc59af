#!/usr/bin/env bash
# Sets everything up and runs the main job (PowerOPD on the embedded default); arguments are Hydra overrides:
#   bash scripts/quickstart.sh reward.token=log_ratio train.steps=50
set -euo pipefail
. "$(dirname "$0")/setup.sh"
ranks=$([ "$variant" = gpu ] && nvidia-smi -L | grep -c GPU || echo 1)
echo "training: torchrun train.py recipe=poweropd $*"
exec torchrun --standalone --nproc_per_node="$ranks" train.py recipe=poweropd "$@"
