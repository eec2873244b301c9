#!/usr/bin/env bash
# Installs the browser that the tests of pages use, from the distribution's packages (Debian, Ubuntu).
set -euo pipefail
command -v chromium >/dev/null && exit 0
[ "$(id -u)" = 0 ] || { echo "$0: needs root" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "$0: needs apt-get" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core
