#!/usr/bin/env bash
# Kernel tests, benchmark and sanitizer of the CuPy pack on a machine with an NVIDIA GPU and no network.
#   OUT=/some/folder bash tests/gpu/kernels.sh [tests] [bench] [sanitize]      (default: all three)
# Installs nothing: the packages are read from their source folders.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-/tmp/llmfw-gpu}
mkdir -p "$OUT"
export PYTHONPATH="$PWD/core/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export LLMFW_CACHE=${LLMFW_CACHE:-/tmp/llmfw-cache} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
stages=${*:-tests bench sanitize}
status=0

for stage in $stages; do
  case $stage in
    tests)
      # Several processes compile at once; the GPU serves them in turn.
      timeout 240 python3 -m pytest tests/gpu/test_cupy_kernels.py tests/gpu/test_latent_kernels.py \
        -q -p no:cacheprovider -o filterwarnings=default -o addopts="--import-mode=importlib" \
        --maxfail=40 --tb=line -n 8 --durations=8 2>&1 | tee "$OUT/tests.log" | tail -60
      ;;
    bench)
      timeout 300 python3 tests/gpu/bench_kernels.py "$OUT/kernels.json" 2>&1 | tee "$OUT/bench.log" |
        cut -c1-190 | grep -v "^products.*M=\(3\|4\) "
      ;;
    sanitize)
      # cuDNN's attention, which references run, gives a hundred reports of races.
      found=0
      for tool in memcheck racecheck; do
        timeout 150 compute-sanitizer --tool $tool --kernel-name-exclude kns=cudnn --error-exitcode 9 \
          python3 tests/gpu/sanitize.py >"$OUT/$tool.log" 2>&1
        code=$?
        echo "$tool: exit $code"
        [ $code -eq 0 ] || found=$code
        tail -5 "$OUT/$tool.log"
      done
      (exit $found)
      ;;
  esac
  code=$?
  echo "== $stage: $code"
  [ $code -eq 0 ] || status=$code
done
exit $status
