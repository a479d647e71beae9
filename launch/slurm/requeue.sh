#!/usr/bin/env bash
# Queues a job of Slurm again after a stop that was asked for, after a spike of the loss that the run went back from, and
# after a hang, which may not befall it for ever.
#
#   bash launch/slurm/requeue.sh CODE STARTED [flags of pretrain_gpt.py]
#
# CODE is srun's exit code, STARTED when it began (date +%s). The third hang without a newer checkpoint in SAVE than at the
# first is the last: SAVE/hangs/job_ID holds the newest checkpoint at the last hang of this job, and its number among those
# that found the same one. Without a folder to count in, the restarts that Slurm counted are taken for hangs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"

most_hangs=3
code=$1
started=$2
shift 2
job=${SLURM_JOB_ID:?"not a job of Slurm"}

save_folder() {
    "$python" -c 'import sys
from megalm.config.parse import parse_command_line
print(parse_command_line(sys.argv[1:]).output.save or "")' "$@"
}

# Where a stopped process had to be killed, srun tells that signal and not the code of those that reported.
left_stacks() { [ -n "$(find "$1/hangs" -name 'rank_*.txt' -newermt "@$2" -print -quit 2>/dev/null)" ]; }

# The number of this hang among those at the same checkpoint, written down.
count_hang() {
    local folder=$1/hangs newest=$2 before="" count=0
    if [ -r "$folder/job_$job" ]; then read -r before count <"$folder/job_$job"; fi
    if [ "$before" != "$newest" ]; then count=0; fi
    mkdir -p "$folder" && echo "$newest $((count + 1))" >"$folder/job_$job" && echo "$((count + 1))"
}

if [ "$code" = 75 ] || [ "$code" = 10 ]; then
    scontrol requeue "$job"
    exit
fi
case $code in 8 | 137 | 143) ;; *) exit ;; esac
save=$(save_folder "$@")
if [ "$code" != 8 ] && ! left_stacks "$save" "$started"; then exit; fi

newest="no checkpoint"
if [ -n "$save" ] && [ -r "$save/latest" ]; then read -r newest <"$save/latest" || true; fi
hangs=""
if [ -n "$save" ]; then hangs=$(count_hang "$save" "${newest// /_}") || true; fi
hangs=${hangs:-$((${SLURM_RESTART_COUNT:-0} + 1))}
if [ "$hangs" -lt "$most_hangs" ]; then
    echo "launch/slurm/requeue.sh: hang $hangs of at most $most_hangs at $newest; job $job is queued again" >&2
    scontrol requeue "$job"
    exit
fi
cat >&2 <<END
launch/slurm/requeue.sh: job $job hung $hangs times at $newest and is not queued again
  the log and ${save:-the standard error of the ranks}${save:+/hangs} say which ranks waited where
  if it is one host each time, leave it out (sbatch --exclude HOST) and look at its GPUs, network and disk; if it is one
  step each time, look at its data, or leave it out with --skip-train-iteration-range; a new job counts from the start
END
