#!/usr/bin/env bash
# Kernel tests, benchmark and sanitizer of the CuPy pack on a machine with an NVIDIA GPU and no network.
#   OUT=/some/folder bash tests/gpu/kernels.sh [tests] [bench] [sanitize]      (default: all three)
# sanitize: PARTS processes of each tool at once, LIMIT seconds for all; OPS="linear moe_route" takes cases of these alone.
# Installs nothing: the packages are read from their source folders.
set -uo pipefail
cd "$(dirname "$0")/../.."
OUT=${OUT:-/tmp/llmfw-gpu}
mkdir -p "$OUT"
export PYTHONPATH="$PWD/core/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export LLMFW_CACHE=${LLMFW_CACHE:-/tmp/llmfw-cache} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
stages=${*:-tests bench sanitize}
status=0

# Every part of both tools at once, each with a log. Fails if one fails, is killed or runs no case.
sanitize() {
  local ops=${OPS:-} found=0 port=49152 tool part log code ran total codes bad
  local parts=${PARTS:-$([ -z "$ops" ] && echo 7 || echo 1)}
  local -A process=()
  for tool in memcheck racecheck; do
    for ((part = 1; part <= parts; part++)); do
      port=$((port + 16)) # each tries ten from there on
      # Names that begin with _Z are those of C++: torch's kernels. Ours are C's.
      # racecheck does not follow the barriers of these sources: docs/design/kernels-cupy.md, "Sanitizers".
      WITHOUT=$([ $tool = racecheck ] && echo streamed.cu tiled.cu latent_tiles.cu paged_streamed.cu) OMP_NUM_THREADS=1 timeout -k 10 "${LIMIT:-200}" \
        compute-sanitizer --tool $tool --port $port --launch-timeout 0 --show-backtrace device \
        --kernel-name-exclude kns=_Z --error-exitcode 9 \
        python3 tests/gpu/sanitize.py "$part/$parts" $ops >"$OUT/$tool-$part.log" 2>&1 &
      process[$tool-$part]=$!
    done
  done
  for tool in memcheck racecheck; do
    total=0 codes=() bad=()
    for ((part = 1; part <= parts; part++)); do
      log=$OUT/$tool-$part.log
      wait "${process[$tool-$part]}"
      code=$?
      ran=$(grep -c '^ran ' "$log")
      codes+=("$code") total=$((total + ran))
      [ "$code" -eq 0 ] && [ "$ran" -gt 0 ] || bad+=("$log")
    done
    echo "$tool: $total cases ran in $parts parts, exit codes ${codes[*]}"
    for log in "${bad[@]}"; do
      found=1
      echo "-- $log: $(grep -c '^ran ' "$log") cases, the last: $(grep '^r[au]n ' "$log" | tail -1)"
      grep -v '^r[au]n ' "$log" | head -20
    done
  done
  return $found
}

for stage in $stages; do
  case $stage in
    tests)
      # Several processes compile at once; the GPU serves them in turn.
      timeout 240 python3 -m pytest tests/gpu/test_cupy_kernels.py tests/gpu/test_latent_kernels.py tests/gpu/test_normed_kernels.py \
        -q -p no:cacheprovider -o filterwarnings=default -o addopts="--import-mode=importlib" \
        --maxfail=40 --tb=line -n 8 --durations=8 2>&1 | tee "$OUT/tests.log" | tail -60
      ;;
    bench)
      timeout 300 python3 tests/gpu/bench_kernels.py "$OUT/kernels.json" 2>&1 | tee "$OUT/bench.log" |
        cut -c1-190 | grep -v "^products.*M=\(3\|4\) "
      ;;
    sanitize)
      sanitize
      ;;
  esac
  code=$?
  echo "== $stage: $code"
  [ $code -eq 0 ] || status=$code
done
exit $status
