#!/usr/bin/env bash
# Everything that wants a GPU, in one go, onto OUT: the build, the tests marked gpu, what synchronisation costs,
# compute-sanitizer on a few cases, and the benchmarks against every peer that is there. Within MINUTES (default 9): what
# has not begun by then is left out, what runs then is interrupted and keeps its results.
#
#   bench/gpu.sh OUT [build] [test] [bench] [sync] [sanitize] [tiers] [variants] [attention]
#
# No step named: all but attention, which has been here before and takes as long again. Needs a Python with torch (CUDA),
# triton, pytest, pytest-benchmark, hypothesis, and cmake, ninja and nvcc. PYTHON names it (default python3). BENCH_CASES
# limits the benchmarks: "g768-b16 t256". A step that fails does not stop the next; the exit status is that of the worst.
#
# Without a GPU every step goes as far as it can (tests skip, programs are compiled, benchmarks check their cases on the
# CPU) and says so: a dry run of this script. DRY=1 asks for that, and for it to be short: no build, few cases.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
dry=${DRY:-}
out=${1:?usage: bench/gpu.sh OUT [build] [test] [sync] [sanitize] [bench] [tiers] [variants] [attention]}
shift
steps=${*:-build test bench sync sanitize tiers variants}
mkdir -p "$out"
worst=0
deadline=$((SECONDS + 60 * ${MINUTES:-9}))

run() { # run SECONDS NAME COMMAND…: interrupted after SECONDS; its output goes to OUT/NAME.log too
  local limit=$1 name=$2 start=$SECONDS left=$((deadline - SECONDS - 10)) status
  shift 2
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  if [ "$limit" -gt 0 ]; then
    timeout --signal=INT --kill-after=15 "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 25
    status=${PIPESTATUS[0]}
  else
    status=124
  fi
  if [ "$status" -eq 124 ]; then echo "$name: out of time"; fi
  echo "== $name: exit $status after $((SECONDS - start)) s"
  if [ "$status" -gt "$worst" ]; then worst=$status; fi
  return "$status"
}

sync() { # without a device it compiles, says so, and exits 3
  "$python" -m bench.sync "$out/sync.json"
  local status=$?
  if [ "$status" -eq 3 ] && [ -z "$gpu" ]; then return 0; fi
  return "$status"
}

sanitize() { # sanitize TOOL KEYWORDS
  local tool=(compute-sanitizer --tool "$1" --error-exitcode 9)
  if [ -z "$gpu" ] || ! command -v compute-sanitizer > /dev/null; then
    echo "sanitize: no device or no compute-sanitizer: the tests run without it"
    tool=()
  fi
  "${tool[@]}" "$python" -m pytest -q -x tests/test_cuda_gpu.py -k "$2" -p no:cacheprovider
}

export -f sync sanitize
gpu=
if command -v nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv | tee "$out/gpu.csv" && gpu=1
fi
[ -n "$gpu" ] || echo "no GPU here: a dry run"
export python out gpu

measure=(--benchmark --benchmark-results "$out/results")
if [ -z "$gpu" ]; then measure=(); fi
cases=()
for case in ${BENCH_CASES:-}; do cases+=(--benchmark-case "$case"); done
if [ -n "$dry" ] && [ -z "${BENCH_CASES:-}" ]; then cases=(--benchmark-case float32-c10 --benchmark-case tier64 --benchmark-case mgu-); fi

for step in $steps; do
  case $step in
    build)
      if [ -n "$dry" ]; then
        run 60 build "$python" -m seqkern info
      else
        run 240 build "$python" -m pip install --quiet --no-build-isolation --no-deps -e . &&
          run 60 info "$python" -m seqkern info
      fi
      ;;
    test) run 150 test "$python" -m pytest -q -m gpu -p no:cacheprovider tests/test_cuda_gpu.py tests/test_plan.py \
      tests/test_info.py ;;
    sync) run 60 sync bash -c sync ;;
    sanitize) # small layers of every tier and cell; racecheck, which is slower, one a tier
      run 90 memcheck bash -c "sanitize memcheck small"
      run 60 racecheck bash -c "sanitize racecheck 'small and lstm and bf16'"
      ;;
    bench) run 150 bench "$python" -m pytest -q bench/bench_lstm.py bench/bench_gru.py bench/bench_rnn.py \
      --benchmark-minutes 2 "${measure[@]}" "${cases[@]}" ;;
    tiers) run 90 tiers "$python" -m pytest -q bench/bench_tiers.py --benchmark-minutes 1 "${measure[@]}" "${cases[@]}" ;;
    variants) run 90 variants "$python" -m pytest -q bench/bench_variants.py --benchmark-minutes 1 "${measure[@]}" \
      "${cases[@]}" ;;
    attention)
      run 300 attention-test "$python" -m pytest -q -m gpu -p no:cacheprovider tests/test_triton.py
      run 500 attention "$python" -m pytest -q bench/bench_attention.py --benchmark-minutes 8 "${measure[@]}" "${cases[@]}"
      ;;
    *)
      echo "gpu.sh: no step $step" >&2
      exit 2
      ;;
  esac
done
echo "== all: exit $worst after $SECONDS s"
exit "$worst"
