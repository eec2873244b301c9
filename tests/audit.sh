#!/usr/bin/env bash
# Asks a database of known vulnerabilities about every version of requirements-lock.txt; 0: none known, or SKIPPED.
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
skip() {
  echo "SKIPPED: requirements-lock.txt was not checked for known vulnerabilities: $1" >&2
  exit 0
}
"${PYTHON:-python3}" -m venv "$folder/venv" || skip "no environment for pip-audit could be made"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check pip-audit 2> "$folder/err" ||
  skip "pip-audit cannot be installed here ($(tail -n 1 "$folder/err"))"
timeout 300 "$folder/venv/bin/pip-audit" --disable-pip --require-hashes --progress-spinner off \
  --format json --output "$folder/found.json" -r requirements-lock.txt 2> "$folder/err"
[ -s "$folder/found.json" ] || skip "the database does not answer ($(tail -n 1 "$folder/err"))"
"$folder/venv/bin/python" - "$folder/found.json" << 'PYTHON'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    packages = json.load(file)["dependencies"]
unknown = [package["name"] for package in packages if "skip_reason" in package]
known = [(package, found) for package in packages for found in package.get("vulns", ())]
for package, found in known:
    fixed = ", ".join(found["fix_versions"]) or "no version"
    print(f"{package['name']} {package['version']}: {found['id']}, mended in {fixed}")
if len(unknown) > len(packages) // 2 and not known:  # an index that serves packages and no database
    print(f"SKIPPED: the database that answers has {len(packages) - len(unknown)} of {len(packages)} packages; not checked")
    sys.exit(0)
print(f"{len(packages)} packages, {len(known)} known vulnerabilities; not in the database: {', '.join(unknown) or 'none'}")
sys.exit(bool(known))
PYTHON
