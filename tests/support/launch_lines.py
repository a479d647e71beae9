"""Command lines in the manner of BLOOM's and its relatives' launch scripts, as a shell would hand them over.

`{folder}` stands for a folder with the files that `write_files` makes.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

DEEPSPEED_FILE = {
    "train_micro_batch_size_per_gpu": 2,
    "train_batch_size": 2048,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 0},
    "bf16": {"enabled": True},
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}
FP16_FILE = {
    "train_micro_batch_size_per_gpu": 1,
    "train_batch_size": 512,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 500,
        "hysteresis": 2,
        "min_loss_scale": 1,
        "initial_scale_power": 12,
    },
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}
UNIVERSAL_FILE = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 1},
    "bf16": {"enabled": True},
    "data_types": {"grad_accum_dtype": "fp32"},
    "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"},
}

BLOOM_176B = """--local_rank=0
--tensor-model-parallel-size 4 --pipeline-model-parallel-size 12 --pp-partition-method 'type:transformer|embedding'
--num-layers 70 --hidden-size 14336 --num-attention-heads 112 --seq-length 2048 --max-position-embeddings 2048
--micro-batch-size 2 --rampup-batch-size 192 16 9_765_625 --global-batch-size 2048 --train-samples 220_000_000
--tokenizer-type PretrainedFromHF --tokenizer-name-or-path {folder}/tokenizer --init-method-std 0.0048
--embed-layernorm --position-embedding-type alibi --bf16 --seed 42 --checkpoint-activations
--abort-on-unmet-fused-kernel-constraints --sync-tp-duplicated-parameters --kill-switch-path {folder}/stop
--pad-vocab-size-to 250880 --optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --lr 6e-5 --min-lr 6e-6
--lr-decay-style cosine --lr-decay-samples 200_000_000 --lr-warmup-samples 183_105 --clip-grad 1.0
--weight-decay 1e-1 --hidden-dropout 0.0 --attention-dropout 0.0 --exit-duration-in-mins 5990 --log-interval 1
--save-interval 300 --eval-interval 300 --eval-iters 10 --log-level info --log-level-replica error
--tensorboard-dir {folder}/tb --tensorboard-queue-size 5 --log-timers-to-tensorboard --log-batch-size-to-tensorboard
--log-validation-ppl-to-tensorboard --deepspeed --deepspeed_config {folder}/ds.json --zero-stage 0
--deepspeed-activation-checkpointing --save {folder}/ckpt --load {folder}/ckpt
--train-weighted-split-paths-path {folder}/train.txt --valid-weighted-split-paths-path {folder}/valid.txt
--num-workers 2 --valid-num-workers 0 --data-impl mmap --distributed-backend nccl"""

GPT_13B_FP16 = """--tensor-model-parallel-size 2 --pipeline-model-parallel-size 8 --num-layers 40 --hidden-size 5120
--num-attention-heads 32 --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 1
--rampup-batch-size 16 16 5_000_000 --global-batch-size 512 --train-samples 300_000_000 --vocab-file {folder}/vocab.json
--merge-file {folder}/merges.txt --tokenizer-type GPT2BPETokenizer --fp16 --checkpoint-activations --optimizer adam
--adam-beta1 0.9 --adam-beta2 0.999 --adam-eps 1e-8 --lr 1e-4 --lr-warmup-samples 216_320 --min-lr 1e-5
--lr-decay-style cosine --lr-decay-samples 126_953_125 --clip-grad 1.0 --weight-decay 1e-1
--exit-duration-in-mins 1190 --log-interval 10 --save-interval 1500 --eval-interval 1000 --eval-iters 5
--tensorboard-dir {folder}/tb --save {folder}/ckpt --load {folder}/ckpt --data-path {folder}/oscar_text_document
--data-impl mmap --split 949,50,1 --distributed-backend nccl --zero-stage 1 --deepspeed
--deepspeed_config {folder}/ds_fp16.json --deepspeed-activation-checkpointing"""

TINY_BY_ITERATIONS = """--deepspeed --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128
--max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 16 --train-iters 1_000 --lr 1e-4
--lr-warmup-iters 5 --lr-decay-iters 800 --lr-decay-style cosine --data-path 0.3 {folder}/a 0.7 {folder}/b
--split "969, 30, 1" --vocab-file {folder}/vocab.json --merge-file {folder}/merges.txt
--tokenizer-type GPT2BPETokenizer --exit-interval 500 --no-load-optim --no-load-rng --override-lr-scheduler --finetune
--load {folder}/ckpt --valid-num-workers 1 --no-bias-gelu-fusion --no-query-key-layer-scaling --eval-only True"""

# tokens in place of samples, a gated MLP, muP and an emissions log: none of it can be obeyed.
EXPERIMENT = """--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5460 --seq-length 2048
--position-embedding-type alibi --micro-batch-size 4 --global-batch-size 512 --lr 2e-4 --lr-decay-tokens 100_000_000_000
--train-tokens 112_000_000_000 --train-samples 54_687_500 --glu-activation geglu --mup --mup-input-mult 10 --bitfit
--skip-train-iteration-range 100-200 300-400 --codecarbon-dir {folder}/carbon --use-bnb-optimizer
--loss-on-targets-only --norm-target-loss --reset-attention-mask --universal-checkpoint --partition-activations
--reweight-loss-based-on-position-frequency --inference --log-path {folder}/logs --dataloader-type cyclic
--tokenizer-type PretrainedFromHF --tokenizer-name-or-path {folder}/tokenizer --data-path {folder}/a --bf16"""

# In the manner of Megatron-LM's functional tests and of DeepSpeed's example for universal checkpoints.
MEGATRON_CORE = """--use-mcore-models --num-layers 12 --hidden-size 512 --num-attention-heads 8 --seq-length 1024
--max-position-embeddings 1024 --micro-batch-size 4 --global-batch-size 32 --train-iters 50 --lr 0.00015
--lr-decay-style cosine --lr-decay-iters 320000 --lr-warmup-fraction .01 --min-lr 1.0e-5 --weight-decay 1e-2 --bf16
--position-embedding-type rope --rotary-percent 0.5 --rotary-base 1000000 --normalization RMSNorm --num-experts 8
--moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --expert-model-parallel-size 2 --context-parallel-size 1
--tensor-model-parallel-size 1 --pipeline-model-parallel-size 2 --transformer-impl local --overlap-grad-reduce
--overlap-param-gather --tp-comm-overlap --calculate-per-token-loss --ckpt-format torch_dist --dist-ckpt-strictness
log_all --dist-ckpt-optim-fully-reshardable --no-mmap-bin-files --log-throughput --wandb-entity team
--exit-signal-handler --vocab-file {folder}/vocab.json --merge-file {folder}/merges.txt --data-path {folder}/a
--split 949,50,1"""

MICROSOFT = """--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --ds-sequence-parallel-size 1
--num-layers 24 --hidden-size 1024 --num-attention-heads 32 --seq-length 1024 --max-position-embeddings 1024
--micro-batch-size 4 --global-batch-size 8 --train-iters 100000 --lr 6.0e-3 --min-lr 6.0e-4 --lr-decay-style cosine
--log-interval 1 --eval-iters 40 --eval-interval 10 --data-path {folder}/a --vocab-file {folder}/vocab.json
--merge-file {folder}/merges.txt --save-interval 100 --split 98,2,0 --clip-grad 1.0 --weight-decay 0.1 --adam-beta1
0.9 --adam-beta2 0.95 --init-method-std 0.006 --bf16 --checkpoint-activations --exit-interval 200 --save
{folder}/ckpt --load {folder}/ckpt --make-vocab-size-divisible-by 256 --tensorboard-dir {folder}/tb --deepspeed
--deepspeed_config={folder}/ds_universal.json --zero-stage=1 --deepspeed-activation-checkpointing
--no-pipeline-parallel"""


def words(line: str, folder: Path) -> list[str]:
    """A launch line as the list that a program receives."""
    return shlex.split(line.format(folder=folder))


def write_files(folder: Path) -> None:
    """The small files that the launch lines name."""
    (folder / "ds.json").write_text(json.dumps(DEEPSPEED_FILE))
    (folder / "ds_fp16.json").write_text(json.dumps(FP16_FILE))
    (folder / "ds_universal.json").write_text(json.dumps(UNIVERSAL_FILE))
    (folder / "train.txt").write_text('"train: 0.25 0:0.949 data/ar, 0.75 0:0.949 data/en"\n')
    (folder / "valid.txt").write_text('"valid_ar: 1 0.949:0.999 data/ar" "valid_en: 1 0.949:0.999 data/en"\n')
