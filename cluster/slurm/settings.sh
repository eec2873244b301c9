# shellcheck shell=bash disable=SC1091,SC2034
# All that a job of grappa_dist needs about your cluster. Copy this file, edit the copy, and submit it:
#
#   cluster/slurm/submit.sh my_settings.sh
#
# It is read by bash: no spaces around "=", lists in parentheses. docs/clusters.md explains every line.

# What to ask Slurm for. Empty: the cluster's default. For two nodes of 8 GPUs and 128 CPUs each, for example:
#
#   NODES=2 GPUS_PER_NODE=8 CPUS_PER_NODE=128
#   OVERRIDES=(resources.gpus_per_worker=1 resources.cpus_per_worker=16 resources.adapt_ranks=4)
#
# gives 16 workers, one per GPU, each with CPUS_PER_NODE / GPUS_PER_NODE CPUs; adaptor sets are trained on 4 of them each.
PARTITION=
ACCOUNT=
TIME=24:00:00
NODES=1
GPUS_PER_NODE=0                  # 0, or a number, or with a type: a100:4
CPUS_PER_NODE=8
MEMORY_PER_NODE=0                # as sbatch --mem; 0: all of a node
SBATCH_FLAGS=()                  # e.g. (--qos=long --constraint=a100 --exclusive)

# What to run. Paths on storage that all nodes see.
RUN_DIR=/shared/runs/mine        # absolute; logs lie in $RUN_DIR/slurm
CONFIG=configs/mrt.yaml          # from the folder of submission, else from the repository; a copy of it is run
OVERRIDES=()                     # e.g. (adapt.epochs=3 resources.adapt_ranks=2)

# Where Python is. Called once on the first node; the other nodes inherit its variables. For conda:
#
#   activate() { source ~/miniforge3/etc/profile.d/conda.sh && conda activate grappa; }
#
# and for modules: activate() { module purge && module load python/3.11 cuda && source /shared/venv/bin/activate; }
activate() {
  source /shared/venv/bin/activate
}
LAUNCH=()                        # put before every Python of ours, e.g. (apptainer exec --nv /shared/grappa.sif)

# The nodes. Empty: found out on each node.
INTERFACE=                       # network interface, e.g. ib0
TEMP_ROOT=/tmp                   # on each node, a short name
SPILL_DIR=                       # where objects go that do not fit into the store; default: below TEMP_ROOT
OBJECT_STORE=1G                  # shared memory of Ray on each node; big arrays do not go through it
RAY_FLAGS=()                     # further flags of `ray start`

# When things go wrong.
START_SECONDS=180                # for all nodes to join, else the job ends with 75
SAVE_SECONDS=120                 # before the time limit the program is asked to save; then the job is requeued
NODE_LOSS=requeue                # or "stay": go on with the nodes that are left
MAX_REQUEUES=50
