#!/usr/bin/env bash
# Starts a program with the `deepspeed` launcher, on this host or on several.
#
#   bash launch/deepspeed.sh --num_gpus 4 pretrain_gpt.py --config configs/debug/tiny.yaml ...     4 processes here
#   bash launch/deepspeed.sh --hostfile hosts --master_addr 10.0.0.1 pretrain_gpt.py ...          on every host in it
#
# Everything before the program goes to `deepspeed` unchanged. `--num_gpus N` counts processes on CPUs too; without it
# (and without --hostfile or --include) one process is started on CPUs, one for each GPU otherwise.
#
# Several hosts: the checkout and its environment lie at the same path on each, `ssh HOST` works without a password, and
# pdsh is installed here. A hostfile has a line `HOST slots=N` for each host (launch/hostfile.example). Variables reach
# the other hosts from ~/.deepspeed_env and ./.deepspeed_env (launch/deepspeed_env.example), lines NAME=VALUE, and from
# this shell where the name begins with NCCL_, GLOO_, UCX_, FI_, MEGALM_, DS_, OMP_, PYTHON, PYTORCH_, TOKENIZERS_ or
# CUDA_DEVICE_.
#
# Signals, one host: SIGTERM, SIGINT and SIGUSR1 reach every rank once; they save and stop, and the exit code is theirs.
# Signals, several hosts: DeepSpeed ends the ranks with SIGTERM; use a kill switch (--kill-switch-path) to save first.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
require_module deepspeed

hostfile=""
has_count=false
has_port=false
has_log_level=false
previous=""
for argument in "$@"; do
    case $argument in *.py) break ;; esac
    case $previous in -H | --hostfile) hostfile=$argument ;; esac
    case $argument in
        --hostfile=*) hostfile=${argument#*=} ;;
        --num_gpus* | --num_accelerators* | --include* | -i | --exclude* | -e | --no_ssh) has_count=true ;;
        --master_port*) has_port=true ;;
        --log_level* | --quiet | -q) has_log_level=true ;;
    esac
    previous=$argument
done

options=()
env_file=""
# The launcher's own lines would bury the run's. Older launchers have no such option.
if ! $has_log_level && grep -q -- --log_level "$(module_file deepspeed launcher/runner.py)"; then
    options+=(--log_level critical)
fi
if [ -n "$hostfile" ]; then
    # DeepSpeed itself goes on with this host alone when the file does not exist.
    if [ ! -r "$hostfile" ]; then
        echo "--hostfile $hostfile: there is no such file, or it cannot be read; see launch/hostfile.example" >&2
        exit 2
    fi
    if ! command -v pdsh >/dev/null && [[ " $* " != *" --launcher "* ]]; then
        echo "--hostfile needs pdsh on this host (apt-get install pdsh), or another --launcher of deepspeed's" >&2
        exit 2
    fi
    # DeepSpeed forwards few variables of its own accord; the rest travels in a file that it reads.
    env_file=$(mktemp "${TMPDIR:-/tmp}/megalm_env.XXXXXX")
    {
        env | grep -E '^(NCCL_|GLOO_|UCX_|FI_|MEGALM_|DS_|OMP_|TOKENIZERS_|PYTORCH_|CUDA_DEVICE_)[A-Z0-9_]*=' | grep -v '^DS_ENV_FILE=' || true
        for file in "$HOME/.deepspeed_env" ./.deepspeed_env; do
            if [ -r "$file" ]; then grep -E '^[A-Za-z_][A-Za-z0-9_]*=' "$file" || true; fi
        done
    } >"$env_file"
    export DS_ENV_FILE=$env_file
else
    if [ "${DS_ACCELERATOR:-}" = cpu ] && ! $has_count; then options+=(--num_gpus 1); fi
    if ! $has_port; then options+=(--master_port "$(free_port)"); fi
fi

# The processes form a tree, deepspeed -> its launch module -> ranks. `deepspeed` would die of a signal and leave them.
# A signal that comes before the ranks are there waits for them.
waiting=""
runner=""
children_of() { cat /proc/"$1"/task/*/children 2>/dev/null || true; }
# A rank that is still starting ignores SIGINT, as all that a script runs in the background: SIGTERM ends it.
for_rank() {
    local ignored
    ignored=$(sed -n 's/^SigIgn:[[:space:]]*//p' /proc/"$2"/status 2>/dev/null) || true
    if [ "$1" = INT ] && [ $((16#${ignored:-0} & 2)) != 0 ]; then echo TERM; else echo "$1"; fi
}
forward() {
    local launcher rank reached=false
    if [ -z "$runner" ]; then
        waiting=$1
        return
    fi
    if [ -n "$hostfile" ]; then
        kill -s TERM "$runner" 2>/dev/null || true
        return
    fi
    for launcher in $(children_of "$runner"); do
        for rank in $(children_of "$launcher"); do if kill -s "$(for_rank "$1" "$rank")" "$rank" 2>/dev/null; then reached=true; fi; done
    done
    if ! $reached; then waiting=$1; fi
}

# At a terminal Ctrl-C goes to every process of the group, wherever its input comes from; a session of its own leaves it
# to `forward`, once.
own_session=""
if { : </dev/tty; } 2>/dev/null && command -v setsid >/dev/null; then own_session=setsid; fi
trap 'forward TERM' TERM HUP
trap 'forward INT' INT
trap 'forward USR1' USR1
$own_session "$python" -m deepspeed.launcher.runner "${options[@]}" "$@" &
runner=$!

# `wait` returns when a signal arrives; the loop goes on until the launcher is gone.
code=0
while true; do
    while [ -n "$waiting" ] && kill -0 "$runner" 2>/dev/null; do
        sleep 0.2 || true # Ctrl-C ends it
        signal=$waiting
        waiting=""
        forward "$signal"
    done
    if wait "$runner"; then code=0; else code=$?; fi
    kill -0 "$runner" 2>/dev/null || break
done
if [ -n "$env_file" ]; then rm -f "$env_file"; fi
# DeepSpeed passes on -N for a rank that signal N has ended; a shell says 128 + N.
if [ -z "$hostfile" ] && [ "$code" -gt 192 ] && [ "$code" -lt 255 ]; then code=$((128 + 256 - code)); fi
case $code in
    0 | 75) ;; # finished, or saved and asked to stop
    1[3-8]? | 19[0-2]) echo "launch/deepspeed.sh: a process was ended by signal $(kill -l $((code - 128)))" >&2 ;;
    *) echo "launch/deepspeed.sh: the processes ended with exit code $code" >&2 ;;
esac
exit "$code"
