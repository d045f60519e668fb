#!/usr/bin/env bash
# Train a descriptor on all GPUs of this machine (or on NPROC processes of its CPU):
#   scripts/train.sh descriptor data.train=LIST.csv weights=DINO.safetensors out=runs/d
# On several machines, run the same line on each with NNODES, NODE_RANK and MASTER (host:port of the first) set.
set -euo pipefail

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
exec torchrun \
    --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "${MASTER:-localhost:0}" \
    --nproc-per-node "${NPROC:-$((gpus > 0 ? gpus : 1))}" \
    -m copynce.cli train "$@"
