#!/usr/bin/env bash
# Is this node fit to train on? GPUs, ECC, clocks, links, network ports, disks, packages, an all-reduce over its ranks:
#
#   bash slurm/preflight.sh CLUSTER                                        # here
#   srun --nodes=64 --ntasks-per-node=1 bash slurm/preflight.sh CLUSTER    # on each node; train.sbatch does so
#
# Each fault is a line that names the node; exit code 3 then. nemo_moviegen/preflight.py says what is checked.
set -euo pipefail
exec python -m nemo_moviegen.preflight "${1:?name a file of recipes/clusters, without .yaml}"
