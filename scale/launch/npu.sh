#!/usr/bin/env bash
# Ascend NPUs: what one_node.sh does on one machine, and between machines where NODES says how many.
# Not run here: scale/README.md says what is used and what is untested.
#
#   scale/launch/npu.sh pretrain.py paper:multitask --model start --data my.jsonl --layout.shard 8
#   NODES=8 NODE=0 FIRST=10.0.0.1 scale/launch/npu.sh pretrain.py ...      # on each machine, NODE 0 to 7
#
# DEVICES    NPUs of this machine; default 8
# NODES      machines; FIRST: the address of the first; NODE: the number of this one; PORT: where they meet
# CANN       where Ascend's toolkit lies
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "usage: $0 SCRIPT.py [STAGE] [OPTIONS]" >&2
    exit 2
fi

CANN="${CANN:-/usr/local/Ascend/ascend-toolkit}"
if [[ -f "$CANN/set_env.sh" ]]; then
    set +u # the toolkit's script reads variables that need not be set
    # shellcheck source=/dev/null
    source "$CANN/set_env.sh"
    set -u
fi
if ! python -c 'import torch_npu' 2>/dev/null; then
    echo "$0: no torch_npu here; install the release that belongs to this PyTorch and this CANN" >&2
    exit 1
fi

# torch_npu registers its device when it is imported, which PyTorch does by itself where it is installed
export TORCH_DEVICE_BACKEND_AUTOLOAD=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PYTORCH_NPU_ALLOC_CONF="${PYTORCH_NPU_ALLOC_CONF:-expandable_segments:True}"
export HCCL_CONNECT_TIMEOUT="${HCCL_CONNECT_TIMEOUT:-600}" # seconds until all ranks have met

where=(--standalone)
if [[ "${NODES:-1}" -gt 1 ]]; then
    where=(
        --nnodes "$NODES"
        --node-rank "${NODE:?number of this machine, from 0}"
        --master-addr "${FIRST:?address of the first machine}"
        --master-port "${PORT:-29500}"
    )
fi
exec torchrun "${where[@]}" --nproc-per-node "${DEVICES:-8}" --max-restarts "${RESTARTS:-3}" "$@"
