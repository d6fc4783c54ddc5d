#!/usr/bin/env bash
# Puts Debian's prometheus and promtool below a folder, without root and without installing them,
# for the tests that need them (tests/prometheus.py looks in the default folder):
#
#   deploy/prometheus/install.sh [FOLDER]
set -euo pipefail

folder=${1:-${XDG_CACHE_HOME:-$HOME/.cache}/loraplex/prometheus}
if [ -x "$folder/usr/bin/prometheus" ]; then
  echo "prometheus is in $folder"
  exit 0
fi
for tool in apt-get dpkg; do
  command -v "$tool" >/dev/null || {
    echo "there is no $tool here: install prometheus and promtool by other means" >&2
    exit 1
  }
done
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
if ! timeout 40 apt-get -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=10 download prometheus 2>log; then
  # The package lists are missing or old; lists of our own need no root.
  mkdir -p lists/partial
  { timeout 40 apt-get -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=10 -o Dir::State::lists="$PWD/lists" update &&
    timeout 40 apt-get -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=10 -o Dir::State::lists="$PWD/lists" download prometheus; } 2>>log || {
    cat log >&2
    echo "the package prometheus can't be downloaded" >&2
    exit 1
  }
fi
dpkg -x prometheus_*.deb unpacked
mkdir -p "$(dirname "$folder")"
rm -rf "$folder"
mv unpacked "$folder"
echo "prometheus is in $folder"
