#!/usr/bin/env bash
# Several machines under SLURM: one torchrun on each, which starts a process for each accelerator.
#
#   sbatch --nodes 8 scale/launch/slurm.sh pretrain.py paper:multitask --model start \
#       --data my.jsonl --out /shared/runs/mine --layout.shard 64 --layout.ep 8 --layout.half
#
# --out and --data must be places that all machines see. Before the time limit SLURM sends SIGTERM
# (--signal); the run then writes a checkpoint and ends, and the same command goes on from there.
# DEVICES, RESTARTS   as in one_node.sh
# PORT                where the machines meet on the first of them; default: by the job's number
#SBATCH --job-name=nanosail
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: sbatch --nodes N $0 SCRIPT.py [STAGE] [OPTIONS]" >&2
    exit 2
fi
if [[ -z "${SLURM_JOB_ID:-}" ]]; then
    echo "$0: not inside a SLURM job; start it with sbatch (one machine: one_node.sh)" >&2
    exit 2
fi

mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
FIRST="${HOSTS[0]}"
PORT="${PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
DEVICES="${DEVICES:-${SLURM_GPUS_ON_NODE:-8}}"
RESTARTS="${RESTARTS:-3}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$DEVICES" \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$FIRST:$PORT" \
    --max-restarts "$RESTARTS" \
    "$@"
