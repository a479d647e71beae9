#!/usr/bin/env bash
# Starts a program on the processes of one host with torchrun; on several hosts, run it on each with --node-rank.
#
#   bash launch/torchrun.sh --nproc-per-node 4 pretrain_gpt.py --config configs/debug/tiny.yaml ...
#   bash launch/torchrun.sh --nnodes 2 --node-rank 0 --master-addr 10.0.0.1 --master-port 29500 --nproc-per-node 8 \
#       pretrain_gpt.py ...
#
# Everything before the program goes to torchrun. Variables: see launch/environment.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
require_module torch

rendezvous=(--master-addr 127.0.0.1 --master-port "$(free_port)")
for argument in "$@"; do
    case $argument in
        *.py) break ;;
        --nnodes* | --rdzv* | --master* | --standalone) rendezvous=() ;;
    esac
done
exec "$python" -m torch.distributed.run "${rendezvous[@]}" "$@"
