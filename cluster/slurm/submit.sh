#!/usr/bin/env bash
# submit.sh SETTINGS [sbatch flags]: submits one job with SETTINGS and prints where its log is.
set -euo pipefail
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
  echo "usage: $0 SETTINGS [sbatch flags]   (copy $(dirname "$0")/settings.sh and edit it)" >&2
  exit 2
fi
code=$(cd "$(dirname "$0")/../.." && pwd)
settings=$(realpath "$1")
shift
for name in $(compgen -e SLURM_); do # for example of an interactive job that this is called from
  [ "$name" = SLURM_CONF ] || unset "$name"
done
fail() {
  echo "$settings: $*" >&2
  exit 2
}
# shellcheck source=cluster/slurm/settings.sh
. "$code/cluster/slurm/settings.sh" # the defaults
known=" $(compgen -v | tr '\n' ' ') COMMAND known name config "
# shellcheck disable=SC1090
. "$settings"
for name in $(compgen -v -X '!*[A-Z]*'); do # a misspelt name must not pass for none; export what is for the program
  case "$known $(compgen -e | tr '\n' ' ') " in *" $name "*) ;; *) fail "$name: no such setting" ;; esac
done
case $RUN_DIR in /*) ;; *) fail "RUN_DIR=$RUN_DIR must be an absolute path on storage that all nodes see" ;; esac
case $NODE_LOSS in requeue | stay) ;; *) fail "NODE_LOSS=$NODE_LOSS must be requeue or stay" ;; esac
if [ -z "${COMMAND+set}" ]; then # by a path from here, else from the repository
  config=$(realpath -q "$CONFIG") && [ -f "$config" ] || config=$code/$CONFIG
  [ -f "$config" ] || fail "CONFIG=$CONFIG: no such file, neither from $PWD nor from $code"
fi
mkdir -p "$RUN_DIR/slurm" || fail "RUN_DIR=$RUN_DIR cannot be made"
kept=$(mktemp "$RUN_DIR/slurm/settings.XXXXXX") # a requeued job reads what was submitted, whatever is edited later
cat "$code/cluster/slurm/settings.sh" "$settings" >"$kept"
if [ -z "${COMMAND+set}" ]; then
  cp "$config" "$kept.yaml"
  printf '\nCONFIG=%q\n' "$kept.yaml" >>"$kept"
fi

flags=(--job-name="grappa-$(basename "$RUN_DIR")" --nodes="$NODES" --ntasks-per-node=1)
flags+=(--cpus-per-task="$CPUS_PER_NODE" --mem="$MEMORY_PER_NODE" --time="$TIME" --signal="B:USR1@$SAVE_SECONDS")
flags+=(--requeue --open-mode=append --output="$RUN_DIR/slurm/%j.log")
[ "$GPUS_PER_NODE" = 0 ] || flags+=(--gpus-per-node="$GPUS_PER_NODE")
[ -z "$PARTITION" ] || flags+=(--partition="$PARTITION")
[ -z "$ACCOUNT" ] || flags+=(--account="$ACCOUNT")
[ "$NODE_LOSS" = requeue ] || flags+=(--no-kill)
job=$(sbatch --parsable "${flags[@]}" ${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"} "$@" "$code/cluster/slurm/grappa.sbatch" "$code" "$kept")
echo "job ${job%%;*}, log $RUN_DIR/slurm/${job%%;*}.log"
