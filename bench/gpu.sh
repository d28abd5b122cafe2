#!/usr/bin/env bash
# Everything that wants a GPU, in one go, onto OUT: the build, the tests marked gpu, compute-sanitizer on a few of
# them, the compiled kernels' resources, and the benchmarks against every peer that is there.
#
#   bench/gpu.sh OUT [build] [test] [sanitize] [bench]      no step named: all of them
#
# Needs a Python with torch (CUDA), triton, pytest, pytest-benchmark, hypothesis, and cmake, ninja and nvcc for the
# build. PYTHON names it (default python3). BENCH_CASES limits the benchmarks: "p1-50 d128-2048". A step that fails does
# not stop the next; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${1:?usage: bench/gpu.sh OUT [build] [test] [sanitize] [bench]}
shift
steps=${*:-build test sanitize bench}
mkdir -p "$out"
worst=0

run() { # run NAME COMMAND…: its output goes to OUT/NAME.log too
  local name=$1 start=$SECONDS status
  shift
  "$@" 2>&1 | tee "$out/$name.log" | tail -n 25
  status=${PIPESTATUS[0]}
  echo "== $name: exit $status after $((SECONDS - start)) s"
  [ "$status" -gt "$worst" ] && worst=$status
}

nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem --format=csv | tee "$out/gpu.csv"
for step in $steps; do
  case $step in
    build) run build "$python" -m pip install --quiet --no-build-isolation --no-deps -e . && "$python" -m seqkern info ;;
    test) run test "$python" -m pytest -q -m gpu -p no:cacheprovider ;;
    sanitize) run sanitize compute-sanitizer --error-exitcode 9 "$python" -m pytest -q -x -m gpu tests/test_triton.py \
      -k "E64 and not large" -p no:cacheprovider ;;
    bench)
      cases=()
      for case in ${BENCH_CASES:-}; do cases+=(--benchmark-case "$case"); done
      run bench "$python" -m pytest -q bench/bench_attention.py --benchmark --benchmark-results "$out/results" "${cases[@]}"
      ;;
    *)
      echo "gpu.sh: no step $step" >&2
      exit 2
      ;;
  esac
done
exit "$worst"
