#!/usr/bin/env bash
# Builds the sdist into a folder, and from it alone a wheel in isolation; installs that elsewhere and runs the smoke test.
#   bash build_tools/check_sdist.sh [FOLDER]
# PIP_CONSTRAINT (pip below 25.3) and PIP_BUILD_CONSTRAINT say which torch the isolated build gets.
set -euo pipefail
mkdir -p "${1:-dist}"
folder=$(cd "${1:-dist}" && pwd)
cd "$(dirname "$0")/.."
version=$(python3 -c 'from build_tools.release import *; print(version_of(open("pyproject.toml").read()))')
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python3 -m venv "$scratch/build"
"$scratch/build/bin/pip" install --quiet --disable-pip-version-check build
"$scratch/build/bin/python" -m build --sdist --outdir "$folder" .

cd "$scratch" # nothing of the source tree from here on, but the smoke test's text
cp "$OLDPWD/build_tools/smoke_test.py" .
FASTTRANSFER_NATIVE=1 "$scratch/build/bin/pip" wheel --quiet --disable-pip-version-check --no-deps --wheel-dir wheel \
    "$folder/fasttransfer-$version.tar.gz"
python3 -m venv "$scratch/user"
"$scratch/user/bin/pip" install --quiet --disable-pip-version-check wheel/*.whl
"$scratch/user/bin/python" smoke_test.py
