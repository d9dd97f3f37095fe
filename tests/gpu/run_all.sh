#!/usr/bin/env bash
# Everything of tests/gpu on a machine with an NVIDIA GPU, without a network.
#   OUT=/some/folder bash tests/gpu/run_all.sh STAGE...     stages: models engines tests bench sanitize startup steps, or S:W1 and the like
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
  timeout "${LIMIT:-240}" python3 -m pytest tests/gpu/test_models.py tests/gpu/test_engine.py tests/gpu/test_many_requests.py tests/gpu/test_recurrent.py tests/gpu/test_families.py \
    -q -n 6 -p no:cacheprovider -o addopts="--import-mode=importlib" -o filterwarnings=default --tb=short \
    >"$OUT/models.log" 2>&1
  tail -30 "$OUT/models.log"
  stages=("${stages[@]/models/}")
fi
if [[ " ${stages[*]} " == *" engines "* ]]; then # engine directories, and what they save at a start
  work=${WORK:-/tmp}
  PYTHONPATH="$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" timeout "${LIMIT:-240}" python3 -m pytest tests/gpu/test_engine_directory.py \
    -q -p no:cacheprovider -o addopts="--import-mode=importlib" -o filterwarnings=default --tb=short \
    >"$OUT/engines.log" 2>&1
  tail -8 "$OUT/engines.log"
  [ -d "$work/llmfw-L" ] || python3 -m llmfw_cli bench make-checkpoint docs/benchmarks/shapes/llama-3.1-8b.json "$work/llmfw-L"
  python3 tests/measure_cold_start.py "$work/llmfw-L" --device cuda --max-model-len 4096 --repeats "${RUNS:-1}" \
    --kinds engine,model --work "$work" --limit "${LIMIT:-240}" --out "$OUT/cold-start.json" | tee "$OUT/cold-start.md"
  stages=("${stages[@]/engines/}")
fi
if [[ " ${stages[*]} " == *" startup "* ]]; then # from disk: a random checkpoint outside of $OUT
  python3 -m llmfw_cli bench make-checkpoint docs/benchmarks/shapes/llama-3.1-8b.json "${CKPT:-/tmp/llmfw-L}"
  timeout "${LIMIT:-240}" python3 -m llmfw_cli bench startup --model "${CKPT:-/tmp/llmfw-L}" --max-model-len 4096 \
    --runs "${RUNS:-2}" --page-cache "${PAGE_CACHE:-warm}" --json | tee "$OUT/startup.json"
  stages=("${stages[@]/startup/}")
fi
if [[ " ${stages[*]} " == *" steps "* ]]; then # decode, prefill and kernels by the product's own commands
  for shape in qwen3-0.6b llama-3.1-8b; do
    shared=(--dummy-weights "docs/benchmarks/shapes/$shape.json" --max-model-len 4096 --no-prefix-caching --json)
    timeout "${LIMIT:-240}" python3 -m llmfw_cli bench decode "${shared[@]}" --batch 1,8,64,256 --context 960 \
      >"$OUT/decode-$shape.json"
    timeout "${LIMIT:-240}" python3 -m llmfw_cli bench prefill "${shared[@]}" --batch 8 --prompt-len 128,512,2048 \
      >"$OUT/prefill-$shape.json"
  done
  timeout "${LIMIT:-240}" python3 -m llmfw_cli kernels bench --device cuda --json >"$OUT/kernels-bench.json"
  timeout "${LIMIT:-240}" python3 -m llmfw_cli kernels bench --large --device cuda --json >"$OUT/kernels-large.json"
  stages=("${stages[@]/steps/}")
fi
stages=(${stages[*]})
[ ${#stages[@]} -eq 0 ] || bash tests/gpu/kernels.sh "${stages[@]}"
