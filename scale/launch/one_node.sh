#!/usr/bin/env bash
# One machine: a process for each of its accelerators, all of them in one group.
#
#   scale/launch/one_node.sh pretrain.py paper:multitask --model start --data my.jsonl --out runs/mine \
#       --layout.shard 8 --layout.half
#
# DEVICES    processes to start; default: as many as PyTorch sees accelerators, one without any
# RESTARTS   how often all ranks start again when one ends; each time they go on from the checkpoint
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: $0 SCRIPT.py [STAGE] [OPTIONS]" >&2
    exit 2
fi

count_devices() {
    python -c 'import torch; print(max(1, torch.accelerator.device_count()))'
}
DEVICES="${DEVICES:-$(count_devices)}"
RESTARTS="${RESTARTS:-3}"

# Ranks that start again must not meet at the old addresses (torch 2.13, pytorch issue 167288)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Kernels of one size reuse each other's memory: documents differ in length
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

exec torchrun --standalone --nproc-per-node "$DEVICES" --max-restarts "$RESTARTS" "$@"
