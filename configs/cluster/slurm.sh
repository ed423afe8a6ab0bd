#!/bin/bash
# Slurm: one run on an allocation, Ray's head on its first node. Submit from the clone, with its .venv on storage that all nodes share:
#
#     sbatch --nodes=4 configs/cluster/slurm.sh my-model.yaml run=/shared/runs/my-model cluster.workers=32 cluster.gpus_per_worker=1
#
# Slurm's signal before the time limit makes the run save and end; with --requeue it continues on the next allocation.
#SBATCH --job-name=trifold
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
set -eu
. .venv/bin/activate
umask 077
RAY_AUTH_TOKEN_PATH=$PWD/.trifold-token-$SLURM_JOB_ID
head -c 32 /dev/urandom | base64 | tr -d '/+=\n' >"$RAY_AUTH_TOKEN_PATH"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH
export RAY_health_check_initial_delay_ms=2000 RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=2000 RAY_health_check_failure_threshold=3

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | cut -d' ' -f1)
srun --nodes=1 --ntasks=1 --overlap --nodelist="$first" \
    ray start --head --node-ip-address="$address" --port=6379 --dashboard-host=127.0.0.1 --disable-usage-stats --block &
sleep 15
if [ "$SLURM_NNODES" -gt 1 ]; then
    srun --nodes=$((SLURM_NNODES - 1)) --ntasks=$((SLURM_NNODES - 1)) --overlap --exclude="$first" \
        ray start --address="$address:6379" --disable-usage-stats --block &
fi

sleep 45  # until all have joined
trifold pretrain "$@" --address "$address:6379" &
run=$!
trap 'kill -TERM $run' TERM
code=0
wait $run || code=$?
while kill -0 $run 2>/dev/null; do code=0; wait $run || code=$?; done # the first wait ended with the signal: now for the save
rm -f "$RAY_AUTH_TOKEN_PATH"
exit "$code"
