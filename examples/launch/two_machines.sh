#!/bin/sh
# Two machines with eight GPUs each; run on both, with NODE=0 on the first and NODE=1 on the other:
#   NODE=0 FIRST=10.0.0.1 sh two_machines.sh --source models/ffhq256 --target babies --preset fsig-near --out /shared/runs/babies
# The run folder must lie on a disk that both see. To go on after a stop, the same with --resume.
set -eu
exec torchrun --nnodes 2 --nproc_per_node "${GPUS:-8}" --node_rank "$NODE" --master_addr "$FIRST" --master_port "${PORT:-29500}" \
  -m unidad.cli train "$@"
