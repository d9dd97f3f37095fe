#!/usr/bin/env bash
# Everything of tests/gpu on a machine with an NVIDIA GPU, without a network.
#   OUT=/some/folder bash tests/gpu/run_all.sh STAGE...     stages: models tests bench sanitize, or S:W1 and the like
# Installs the packages without their dependencies, for their entry points.
set -uo pipefail
cd "$(dirname "$0")/../.."
export OUT=${OUT:-/tmp/llmfw-gpu} PYTHONUNBUFFERED=1 LLMFW_CACHE=${LLMFW_CACHE:-/tmp/llmfw-cache}
mkdir -p "$OUT"
python3 -m pip install -q --no-deps --no-build-isolation -e core -e cli $(printf -- '-e %s ' builtin_models/*/) 2>&1 | grep -v WARN
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
works=()
stages=()
for item in "$@"; do
  case $item in *:* | *=*) works+=("$item") ;; *) stages+=("$item") ;; esac
done
if [ ${#works[@]} -gt 0 ]; then
  timeout "${LIMIT:-240}" python3 tests/gpu/workloads.py "$OUT/workloads.json" "${works[@]}" 2>&1 | tee "$OUT/workloads.log" | tail -60
fi
if [[ " ${stages[*]} " == *" models "* ]]; then # several processes at once: each takes little of the cache
  export PYTHONPATH="$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
  timeout "${LIMIT:-240}" python3 -m pytest tests/gpu/test_models.py tests/gpu/test_engine.py tests/gpu/test_families.py \
    -q -n 6 -p no:cacheprovider -o addopts="--import-mode=importlib" -o filterwarnings=default --tb=short \
    >"$OUT/models.log" 2>&1
  tail -30 "$OUT/models.log"
  stages=("${stages[@]/models/}")
fi
stages=(${stages[*]})
[ ${#stages[@]} -eq 0 ] || bash tests/gpu/kernels.sh "${stages[@]}"
