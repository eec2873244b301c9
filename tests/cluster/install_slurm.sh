#!/usr/bin/env bash
# Installs Slurm and munge from the distribution's packages (Debian, Ubuntu), for the tests; starts no service.
set -euo pipefail
lacking=
for tool in slurmctld slurmd sbatch munged ip unshare nsenter setpriv ps; do
  command -v "$tool" >/dev/null || lacking="$lacking $tool"
done
[ -n "$lacking" ] || exit 0
[ "$(id -u)" = 0 ] || { echo "$0: needs root" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "$0: needs apt-get" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends \
  slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2 util-linux procps
