#!/usr/bin/env bash
# One process of a Slurm job step: Slurm's variables under the names that megalm reads. srun starts it for each GPU.
#
#   srun bash launch/slurm/task.sh pretrain_gpt.py ...
#
# MASTER_ADDR must be set to the first host of the job; MASTER_PORT is 29500 when not set.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

export RANK=${SLURM_PROCID:?"not started by srun"}
export WORLD_SIZE=${SLURM_NTASKS:?"not started by srun"}
export LOCAL_RANK=${SLURM_LOCALID:?"not started by srun"}
export MASTER_ADDR=${MASTER_ADDR:?"set it to the first host of the job"}
export MASTER_PORT=${MASTER_PORT:-29500}
exec "$python" -u "$@"
