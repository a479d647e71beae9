"""Flags of the Megatron family that are refused together: those of one feature, or with one thing to do instead."""

from __future__ import annotations

from megalm.config.flag_refusals import OFFLOAD, SHAPE, TELEMETRY
from megalm.config.flags import family

FAMILIES = (
    # What is trained.
    family(
        "--moe-* --expert-* --num-experts-switch --topk --mlp-type --create-moe-param-group --use-tutel "
        "--enable-expert-tensor-parallelism --overlap-moe-expert-parallel-comm --high-priority-a2a-comm-stream "
        "--overlap-dispatch-backward-with-experts-wgrad --ep-overlap-early-attn-memory-release "
        "--use-grouped-gemm-for-shared-expert --use-fused-weighted-squared-relu --save-tokens-per-expert-interval",
        "there are no mixtures of experts",
        "remove it to train a dense model",
    ),
    family(
        "--mamba-* --hybrid-* --is-hybrid-model --experimental-attention-variant --dsa-* --linear-attention-freq "
        "--linear-conv-kernel-dim --linear-key-head-dim --linear-value-head-dim --linear-num-key-heads "
        "--linear-num-value-heads --heterogeneous-*",
        "every layer is attention and an MLP, of one size",
        SHAPE,
    ),
    family(
        "--multi-latent-attention --mla-* --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim "
        "--v-head-dim --rotary-scaling-factor --mscale --mscale-all-dim --cache-mla-latents",
        "there is no multi-latent attention",
        SHAPE,
    ),
    family(
        "--rotary-* --rope-* --use-rope-scaling --yarn-* --mrope-section --relative-attention-* --enable-gpt-oss",
        "positions are alibi or learned",
        "pass --position-embedding-type alibi or absolute",
    ),
    family(
        "--window-size --window-attn-skip-freq --qk-layernorm --qk-l2-norm --qk-clip* --attention-output-gate "
        "--apply-wd-to-qk-layernorm --no-weight-decay-cond-type",
        "a token attends to all before it, by the scaled product of query and key",
        SHAPE,
    ),
    family(
        "--quick-geglu --glu-linear-offset --activation-func-clamp-value",
        "the gate is plain",
        "pass --glu-activation geglu, swiglu, reglu or liglu",
    ),
    family("--mtp-*", "the loss is of the next token alone", "remove it"),
    family("--mup-* --use-mup", "widths are not re-parameterised", "remove it and tune --lr at this width"),
    family("--retro-*", "nothing is retrieved", "remove it to train a GPT"),
    family(
        "--bert-* --ict-* --biencoder-* --retriever-* --indexer-* --output-bert-embeddings --titles-data-path "
        "--query-in-block-prob --use-one-sent-docs --evidence-data-path --block-data-path --embedding-path "
        "--decoder-seq-length --decoder-num-layers --encoder-tensor-model-parallel-size "
        "--encoder-pipeline-model-parallel-size --pipeline-model-parallel-split-rank",
        "there is no BERT, T5 or retriever",
        "remove it to train a GPT",
    ),
    family(
        "--vision-* --dino-* --img-h --img-w --img-dim --num-classes --num-channels --patch-dim --classes-fraction "
        "--data-per-class-fraction --head-lr-mult --swin-backbone-type --mask-type --mask-factor --iter-per-epoch",
        "there are no images",
        "remove it to train a GPT",
    ),
    family(
        "--perform-rl-step --rl-* --grpo-* --langrl-* --refit-method",
        "there is no reinforcement learning",
        "remove it; tools/export_hf.py hands the model to programs that have it",
    ),
    family(
        "--kd --kd-* --mos --load-teacher --num-layers-teacher --num-experts-teacher --hidden-size-teacher "
        "--num-attention-heads-teacher --logits-save-* --logits-load-*",
        "there is no teacher",
        "remove it to train on the tokens alone",
    ),
    family(
        "--export-* --modelopt-enabled --finetune-hf-dataset --finetune-data-split",
        "nothing is quantised, pruned or distilled",
        "remove it; tools/export_hf.py hands the model to programs that do",
    ),
    family(
        "--sft --sft-* --chat-template",
        "documents are plain text",
        "apply the conversation template before tools/preprocess_data.py, and remove it",
    ),
    family(
        "--fim-*",
        "documents are read from begin to end",
        "remove it, and rearrange documents before tools/preprocess_data.py",
    ),
    family(
        "--inference-* --ds-inference --max-tokens-to-oom --flash-decode --decode-only-cuda-graphs "
        "--enable-chunked-prefill --disable-chunked-prefill --num-speculative-tokens --mlp-chunks-for-prefill "
        "--use-legacy-static-engine --nccl-all-reduce-for-prefill --use-same-sampling-seed-across-dp-ranks "
        "--batch-invariant-mode",
        "this program trains",
        "remove it; generate with tools/generate.py",
    ),
    # How it is updated.
    family("--use-precision-aware-optimizer", "the optimizer's state is fp32", "remove it"),
    family("--muon-* --lion-*", "the optimizer is AdamW", "pass --optimizer adam, and remove it"),
    family(
        "--lr-wsd-*",
        "the learning rate decays once, after the warm-up",
        "pass --lr-decay-style cosine, linear or constant",
    ),
    family("--decoupled-lr --decoupled-min-lr", "there is one learning rate", "pass --lr and --min-lr alone"),
    family(
        "--freeze-all-layers --embedding-init-method-std",
        "all weights start by one rule, and all are trained",
        "remove it, and pass --init-method-std",
    ),
    family(
        "--optimizer-cpu-offload --optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload --pin-cpu-grads "
        "--pin-cpu-params --overlap-cpu-optimizer-d2h-h2d",
        "set it in the DeepSpeed JSON",
        OFFLOAD,
    ),
    family(
        "--step-batch-size-schedule --phase-transition-iterations --decrease-batch-size-if-needed",
        "the batch grows by --rampup-batch-size alone",
        "pass --rampup-batch-size START INCREMENT SAMPLES",
    ),
    family(
        "--check-for-spiky-loss",
        "a loss that jumps and stays up is --loss-spike-threshold's affair",
        "pass --loss-spike-threshold 6",
    ),
    family(
        "--check-for-large-grads --no-check-for-nan-in-loss-and-grad",
        "updates whose gradients are not finite are left out, and no others",
        "remove it; --max-skipped-steps says how many in a row end the run",
    ),
    # Arithmetic and kernels.
    family(
        "--fp8-* --first-last-layers-bf16 --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16 "
        "--keep-fp8-transpose-cache --keep_fp8_weight_transpose_cache --reuse-grad-buf-for-mxfp8-param-ag "
        "--te-precision-config-file",
        "8-bit products scale each tensor by its own largest element, in every layer; weights have 16 bits",
        "pass --fp8-format hybrid or e4m3 alone",
    ),
    family("--fp4-*", "there is no 4-bit arithmetic", "pass --fp8-format hybrid or e4m3"),
    family("--grad-reduce-in-bf16", "gradients of bf16 weights are summed and reduced in fp32", "remove it"),
    family(
        "--embedding-weights-in-fp32 --disable-bf16-reduced-precision-matmul",
        "weights and products have the training dtype",
        "remove it; output.linear=fp32 multiplies in fp32",
    ),
    family(
        "--use-transformer-engine-op-fuser --use-te-activation-func --flash-attention-version --use-kitchen-attention "
        "--kitchen-* --use-grouped-gemm-for-dense-mlp --fused-residual-rmsnorm --mlp-chunks-for-training --spec",
        "the blocks are megalm's own",
        "remove it; --attention-kernel, --layer-norm-kernel and their like name kernels",
    ),
    family(
        "--use-flash-attn-v1 --use-flash-attn-triton --use-flash-attn-builder",
        "attention cores are chosen by name",
        "pass --attention-kernel sdpa",
    ),
    family("--disable-jit-fuser", "blocks are compiled by torch.compile", "pass --no-compile"),
    family(
        "--cuda-graph-scope --cuda-graph-modules --cuda-graph-warmup-steps --external-cuda-graph "
        "--optimizer-cuda-graph",
        "a CUDA graph holds forward and backward of a micro-batch",
        "pass --cuda-graph",
    ),
    family("--deterministic-mode", "there is one mode", "remove it; a resumed run repeats an unbroken one's bits"),
    family(
        "--manual-gc --manual-gc-interval --manual-gc-eval --train-sync-interval",
        "when memory is collected, and the device waited for, is Python's and torch's own choice",
        "remove it",
    ),
    # Layout, memory and communication.
    family(
        "--cp-comm-type --hierarchical-context-parallel-sizes --hybrid-context-parallel --max-seqlen-per-dp-cp-rank "
        "--force-ds-sequence-parallel --ds-sequence-parallel-*",
        "a sample is not split over processes in attention",
        "remove it; --sequence-parallel saves activations",
    ),
    family(
        "--decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --pipeline-model-parallel-layout "
        "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --standalone-embedding-stage",
        "layers are dealt to stages by --pp-partition-method",
        "pass --pp-partition-method; 'type:transformer|embedding' counts embedding and head as layers",
    ),
    family(
        "--microbatch-group-size-per-virtual-pipeline-stage --enable-zbh1-pipeline --enable-zbh1-exact-semantics",
        "a stage holds one run of layers, and takes forward and backward in turn",
        "remove it",
    ),
    family(
        "--overlap-grad-reduce --overlap-param-gather --overlap-p2p-communication "
        "--overlap-p2p-communication-warmup-flush --use-ring-exchange-p2p --overlap-param-gather-with-optimizer-step "
        "--delay-param-gather --delay-wgrad-compute --defer-embedding-wgrad-compute --wgrad-deferral-limit "
        "--use-layer-wise-param-layout --no-gradient-reduce-div-fusion --tp-comm-*",
        "the engine decides when gradients, weights and activations are sent",
        "remove it",
    ),
    family(
        "--ddp-*",
        "set sizes of buckets in the DeepSpeed JSON",
        'use {"zero_optimization": {"reduce_bucket_size": N, "allgather_bucket_size": N}}, or remove it',
    ),
    family(
        "--use-megatron-fsdp --megatron-fsdp-* --use-torch-fsdp2 --torch-fsdp2-* --use-custom-fsdp --fsdp-* "
        "--outer-dp-sharding-strategy --enable-full-sharding-in-hsdp "
        "--suggested-communication-unit-size --create-all-gather-group "
        "--init-model-with-meta-device --tensor-parallel-num-weight-shards",
        "weights and optimizer state are sharded by ZeRO",
        "pass --zero-stage 1, 2 or 3",
    ),
    family(
        "--nccl-communicator-config-path --use-nccl-ub --disable-symmetric-registration --use-sharp "
        "--sharp-enabled-group --high-priority-stream-groups --symmetric-ar-type "
        "--pipeline-model-parallel-comm-backend --distributed-timeout-seconds-after-init",
        "communicators are made by torch, with NCCL's own settings",
        "remove it, and set the NCCL_ variables of the environment",
    ),
    family(
        "--use-tp-pp-dp-mapping --fake-process-group",
        "ranks run over the tensor axis first, then data, then pipeline",
        "remove it",
    ),
    family(
        "--fine-grained-* --offload-modules --min-offloaded-tensor-size --delay-offload-until-cuda-graph "
        "--delta-offload-bytes-across-pp-ranks --activation-offload-fraction --cpu-offloading-*",
        "saved activations stay on the device",
        "remove it; use --sequence-parallel or --recompute-granularity",
    ),
    family(
        "--data-parallel-random-init --no-initialization",
        "weights are drawn from the seed, the same on every replica",
        "remove it",
    ),
    # Data.
    family(
        "--train-data-path --valid-data-path --test-data-path --per-split-data-args-path",
        "a set with corpora of its own is a group, with the share of each corpus",
        'pass --train-weighted-split-paths "train: WEIGHT 0:1 PREFIX, ...", and --valid- and --test- likewise',
    ),
    family("--data-args-path", "the corpora are listed in the command", "pass --data-path $(cat FILE)"),
    family("--aml-data-download-path", "a prefix is a path", "write the folder before each prefix of --data-path"),
    family(
        "--train-idx-path --train-desc-path --train-doc-idx-path --train-sample-idx-path --train-shuffle-idx-path "
        "--train-data-exact-num-epochs --repeated-dataloader --random-ltd --data-efficiency-curriculum-learning "
        "--return-data-index --use-dataset-only",
        "samples are whole, and their order follows from seed, corpora and --sample-order",
        "remove it",
    ),
    family(
        "--per-dataset-sequences-path --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap "
        "--object-storage-cache-path --s3-cache-path --enable-msc",
        "corpora are files, and their sample maps are built once, then mapped",
        "remove it; --data-cache-path says where the maps are",
    ),
    family(
        "--dataloader-inter-document-masking",
        "documents are told apart by the end-of-document token",
        "pass --reset-attention-mask",
    ),
    family(
        "--tokenizer-library --tokenizer-metadata --tokenizer-special-tokens --tokenizer-sentencepiece-* "
        "--tokenizer-hf-* --tiktoken-* --legacy-tokenizer --trust-remote-code --null-tokenizer-* "
        "--allow-ambiguous-pad-tokens",
        "tokens are those of the tokenizer's files, which run no code of their own, and nothing is padded",
        "remove it",
    ),
    family(
        "--start-eval-at-iter --eval-global-batch-size --eval-micro-batch-size --full-validation "
        "--multiple-validation-sets --validation-set-names",
        "a validation is --eval-iters global batches of each group, every --eval-interval steps",
        "remove it; --valid-weighted-split-paths names groups that are evaluated apart",
    ),
    # Checkpoints.
    family(
        "--ckpt-* --dist-ckpt-* --use-dist-ckpt --strict-fsdp-dtensor-load --stream-ckpt-dequant "
        "--distrib-optim-fully-reshardable-mem-efficient",
        "checkpoints have the DeepSpeed layout, which loads into any other",
        "remove it",
    ),
    family(
        "--async-strategy --async-ckpt-* --use-persistent-ckpt-worker --checkpoint-io-buffer-size "
        "--checkpoint-data-parallel --checkpoint-writer-decoupled --aio-intra-op-parallelism",
        "checkpoints that are written while training goes on have one form",
        "pass --async-save alone",
    ),
    family(
        "--non-persistent-* --replication --replication-*",
        "checkpoints are written to --save, each of them whole",
        "remove it; --save-interval, --keep-last and --keep-every say how many there are",
    ),
    family(
        "--save-params-interval --save-activations-interval --save-wgrads-interval --save-dgrads-interval "
        "--dump-param-to-param-group-map --config-logger-dir",
        "nothing is dumped beside checkpoints, which hold config.yaml",
        "remove it",
    ),
    # Beside training.
    family(
        "--inprocess-* --enable-ft-package --calc-ft-timeouts --ft-* --gpu-sniff-test-interval "
        "--result-rejected-tracker-filename --run-workload-inspector-server",
        "hangs and gradients that are not finite end a run, which the launcher starts again",
        "remove it; see --hang-timeout-minutes and --max-skipped-steps",
    ),
    family(
        "--fault-injector-* --error-injection-* --test-mode --enable-experimental",
        "nothing is tried out in a run",
        "remove it",
    ),
    family(
        "--flight-recorder-*",
        "a hang ends with every rank's stacks",
        "remove it; see --hang-timeout-minutes",
    ),
    family(
        "--enable-one-logger --one-logger-* --app-tag-run-name --app-tag-run-version",
        "there is no one-logger",
        "pass --wandb-project or --tensorboard-dir, or remove it",
    ),
    family(
        "--log-params-norm --log-num-zeros-in-grad --log-memory-to-tensorboard --log-optimizer-states-to-tensorboard "
        "--log-progress --log-energy --log-device-memory-used --log-memory-interval --log-max-attention-logit "
        "--timing-log-option",
        "none of it is recorded",
        TELEMETRY,
    ),
    family(
        "--straggler-* --disable-straggler-on-startup",
        "slow ranks are named in the log, from the start",
        "remove it and pass --log-straggler",
    ),
    family(
        "--record-memory-history --memory-snapshot-path --record-shapes --nvtx-ranges --pytorch-profiler-*",
        "a profile is a trace and each kernel family's share",
        "pass --profile alone",
    ),
)
