#!/usr/bin/env bash
# From nothing to a trained, exported language model on this machine: at most 8 minutes on two cores, set-up aside.
#
#   bash launch/quickstart.sh [--fast] [--output FOLDER]
#
# --fast      the same path in about a minute, with less text and fewer steps
# --output    where everything goes (default: runs/quickstart, or runs/quickstart-fast); what was there is replaced
#
# Fails unless the validation loss ends at least 1.0 nat below the unigram entropy of the validation tokens
# (--fast: below it at all). Variables: see launch/setup_env.sh and launch/environment.sh.
set -euo pipefail

fast=false
output=""
while [ $# -gt 0 ]; do
    case $1 in
        --fast) fast=true ;;
        --output) output=${2:?--output needs a folder}; shift ;;
        --output=*) output=${1#*=} ;;
        -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) echo "unknown argument $1; see: bash launch/quickstart.sh --help" >&2; exit 2 ;;
    esac
    shift
done

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bash "$here/setup_env.sh"
source "$here/environment.sh"
require_module deepspeed
require_module transformers

if $fast; then
    corpus_mb=6 first_stop=150 steps=200 eval_interval=50 margin=0.0001
    overrides=(training.eval_iters=10 training.lr_warmup_iters=40)
else
    corpus_mb=24 first_stop=600 steps=800 eval_interval=100 margin=1.0
    overrides=()
fi

output=${output:-$root/runs/quickstart$($fast && echo -fast || true)}
# Only what an earlier quickstart left is removed, and only where it left its mark.
if [ -e "$output" ] && [ ! -f "$output/.quickstart" ]; then
    echo "$output exists and was not made by this script; name another folder with --output" >&2
    exit 2
fi
rm -rf "$output"
mkdir -p "$output"
touch "$output/.quickstart"
output=$(cd "$output" && pwd)
cd "$root"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 # nothing is downloaded

# TP2 x PP2 on four processes; on machines with one to three GPUs, what fits them.
processes=4 layout=(--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2)
if [ "${DS_ACCELERATOR:-}" != cpu ]; then
    gpus=$(nvidia-smi -L | grep -c GPU)
    if [ "$gpus" -lt 2 ]; then
        processes=1 layout=()
    elif [ "$gpus" -lt 4 ]; then
        processes=2 layout=(--tensor-model-parallel-size 2)
    fi
fi

began=$SECONDS
step() {
    printf '\n[quickstart] %d s  %s\n' "$((SECONDS - began))" "$1"
}

step "1/7  gather a corpus from the Python installed here"
"$python" tools/gather_corpus.py --output "$output/corpus.jsonl" --target-mb "$corpus_mb" \
    --min-mb "$((corpus_mb * 5 / 6))"

step "2/7  train a byte-level BPE tokenizer of 4,096 tokens"
"$python" tools/train_tokenizer.py --input "$output/corpus.jsonl" --output "$output/tokenizer" --vocab-size 4096

step "3/7  tokenize"
"$python" tools/preprocess_data.py --input "$output/corpus.jsonl" --output-prefix "$output/data/corpus" \
    --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$output/tokenizer" --append-eod --workers 2

# Usage: train WANTED_EXIT_CODE [more flags]. The schedule spans all steps, wherever a run stops.
train() {
    local wanted=$1 code=0
    shift
    bash launch/deepspeed.sh --num_gpus "$processes" pretrain_gpt.py --config configs/bloom/quickstart.yaml \
        "${layout[@]}" \
        --data-path "$output/data/corpus_text_document" \
        --tokenizer-type PretrainedFromHF --tokenizer-name-or-path "$output/tokenizer" \
        --train-iters "$steps" --eval-interval "$eval_interval" --log-interval 20 \
        --save "$output/checkpoints" --save-interval "$first_stop" \
        --tensorboard-dir "$output/tensorboard" \
        --wandb-project megalm-quickstart output.wandb_mode=offline output.wandb_dir="$output" \
        "$@" "${overrides[@]}" || code=$?
    if [ "$code" != "$wanted" ]; then
        echo "[quickstart] training ended with exit code $code, not $wanted" >&2
        exit 1
    fi
}

step "4/7  train a BLOOM on $processes process(es), and stop after step $first_stop of $steps"
train 75 --exit-interval "$first_stop" # 75: saved and asked to stop

step "5/7  continue from the checkpoint to step $steps"
train 0 --load "$output/checkpoints"

step "6/7  export to a Hugging Face folder, hold it against transformers, and let it write"
"$python" tools/export_hf.py --load "$output/checkpoints" --save "$output/hf" --verify
printf '\nA sampled continuation of "def read_file(path":\n'
"$python" tools/generate.py --load "$output/hf" --prompt "def read_file(path" --max-new-tokens 60 \
    --temperature 0.7 --top-k 40

step "7/7  sum up"
code=0
"$python" tools/summarise_run.py --load "$output/checkpoints" --picture "$output/loss.png" \
    --output "$output/summary.json" --require-margin "$margin" || code=$?

cat <<END

corpus                $output/corpus.jsonl
tokenizer             $output/tokenizer
tokens                $output/data/corpus_text_document.bin, .idx
checkpoints           $output/checkpoints
metrics               $output/checkpoints/metrics.jsonl
TensorBoard           $output/tensorboard
W&B (offline)         $output/wandb
Hugging Face model    $output/hf
curve                 $output/loss.png
summary               $output/summary.json
END
if [ "$code" != 0 ]; then
    echo "[quickstart] FAILED after $((SECONDS - began)) s" >&2
    exit "$code"
fi
echo "[quickstart] passed in $((SECONDS - began)) s"
