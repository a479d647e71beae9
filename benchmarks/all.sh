#!/usr/bin/env bash
# Every figure of docs/performance.md for the device that is found: kernels, then whole steps beside their peers.
#
#   bash benchmarks/all.sh [FOLDER]     results as JSON, tables and pictures in FOLDER (default: runs/performance)
#   KERNEL_TESTS=1 bash benchmarks/all.sh    first the tests that only a GPU can pass, and the kernels' tests on it
#
# On one Hopper GPU all of it takes about 20 minutes; PARTS="tests kernels small large" chooses among the parts.
# PARTS=marks times the trainer beside each peer where docs/performance.md compares them, in about 7 minutes.
# PARTS=largest trains the largest models beside the plain GPT in its arithmetic, all in bf16.
# PARTS=candidates tests and times the kernels that `auto` tries before a run, by name and by its choice, in about 5.
set -uo pipefail
case ${1:-} in
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "unknown argument $1; see: bash benchmarks/all.sh --help" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
folder=${1:-runs/performance}
parts=${PARTS:-${KERNEL_TESTS:+tests} kernels small large}
for part in $parts; do
    case $part in
        tests | kernels | small | large | marks | largest | candidates) ;;
        *) echo "no part named $part: tests, kernels, small, large, marks, largest, candidates" >&2; exit 2 ;;
    esac
done
mkdir -p "$folder"
failed=0

run() { # run NAME COMMAND...: prints, keeps the output, goes on after a failure and remembers it
    local name=$1
    shift
    echo "== $name: $*"
    "$@" 2>&1 | tee "$folder/$name.txt" || { echo "== $name failed" >&2; failed=1; }
}

step() { # step MODEL ARGUMENTS...
    mark "$1" "$@"
}

mark() { # mark NAME MODEL ARGUMENTS...: a step under a name of its own
    run "step-$1" "$python" benchmarks/train_step.py --model "$2" --json "$folder/step-$1.json" "${@:3}"
}

for part in $parts; do
    case $part in
        tests)
            run tests "$python" -m pytest -v tests/gpu tests/unit/kernels tests/unit/train/test_compile.py \
                tests/unit/parallel
            ;;
        kernels) run kernels "$python" benchmarks/kernels.py --json "$folder/kernels.json" ;;
        small)
            if [ "${DS_ACCELERATOR:-}" = cpu ]; then
                step bloom-quickstart --device cpu --peer transformers plain-compile --num-micro-batches 1 \
                    --steps 30 --rounds 3
            else
                step bloom-560m --peer plain-compile transformers --micro-batch-sizes 4 8 16
            fi
            ;;
        large)
            if [ "${DS_ACCELERATOR:-}" != cpu ]; then
                step bloom-1b7 --peer plain-compile transformers --micro-batch-sizes 2 4 8
            fi
            ;;
        marks)
            few=(--warmup-steps 2 --steps 5)
            mark 560m-plain bloom-560m --peer plain-compile --micro-batch-sizes 8 "${few[@]}"
            mark 560m-transformers bloom-560m --peer transformers --micro-batch-sizes 4 "${few[@]}"
            mark 1b7-plain bloom-1b7 --peer plain-compile --micro-batch-sizes 8 "${few[@]}"
            mark 1b7-largest bloom-1b7 --peer plain-compile --micro-batch-sizes 16 20 --num-micro-batches 2 "${few[@]}" \
                parallel.recompute=activation
            ;;
        largest)
            one=(--micro-batch-sizes 1 --num-micro-batches 2 --warmup-steps 1 --steps 2)
            for layers in 30 36; do # 7.1 and 8.3 B parameters
                mark "7b1-$layers-layers" bloom-7b1 --peer plain-compile "${one[@]}" \
                    --deepspeed-config benchmarks/pure_bf16.json parallel.zero_stage=2 "model.num_layers=$layers"
            done
            ;;
        candidates)
            few=(--warmup-steps 2 --steps 5)
            run tests-candidates "$python" -m pytest -v -s tests/unit/kernels/test_gelu_linear.py \
                tests/unit/kernels/test_adamw.py tests/unit/kernels/test_trial.py
            run kernels-candidates "$python" benchmarks/kernels.py --only MLP AdamW
            mark 1b7-separate bloom-1b7 --peer plain-compile --micro-batch-sizes 8 "${few[@]}" \
                output.gelu_linear=separate output.adamw=torch
            mark 1b7-auto bloom-1b7 --micro-batch-sizes 8 "${few[@]}"
            mark 1b7-cublaslt bloom-1b7 --micro-batch-sizes 8 "${few[@]}" output.gelu_linear=cublaslt \
                output.adamw=torch
            mark 1b7-adamw bloom-1b7 --micro-batch-sizes 8 "${few[@]}" output.gelu_linear=cublaslt output.adamw=triton
            ;;
    esac
done
"$python" benchmarks/draw.py "$folder" --picture "$folder/performance.png" --table "$folder/performance.md"
exit "$failed"
