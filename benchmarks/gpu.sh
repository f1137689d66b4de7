#!/usr/bin/env bash
# Tests and measures fastlm on a GPU machine that has its own torch and triton and no network, within nine minutes.
#
#   benchmarks/gpu.sh [--dry] [--wheel FILE] [--only conformance|correctness|ops|attention|models|sanitizer]... [OUTDIR]
#
# Installs the checkout (or FILE) without dependencies into a temporary folder, compares the instructions of csrc/device with their
# host body, runs the op tests compiled, then the op benchmarks, then whole models, as far as the time goes, and prints a short table
# last. --only takes a part (several allowed); sanitizer, the CUDA kernels under compute-sanitizer, runs only so. OUTDIR (default
# gpu-results) gets summary.txt, conformance.txt, tests.txt, ops.txt, ops.jsonl, train.jsonl and generate.jsonl; what is there is kept
# if the run is stopped. `python -m benchmarks report OUTDIR` makes the page. --dry walks the same path on a CPU with tiny sizes.
set -uo pipefail
set -m # else bash lets background jobs ignore the SIGINT by which pytest is asked to stop and sum up

limit=520 tests_limit=280 job=""
dry=0 wheel="" out="" only=""
while [ $# -gt 0 ]; do
  case "$1" in
    --dry) dry=1 ;;
    --wheel) wheel="$(realpath "$2")"; shift ;;
    --only)
      case "${2:-}" in
        conformance|correctness|ops|attention|models|sanitizer) only="$only $2"; shift ;;
        *) echo "gpu.sh: --only takes conformance, correctness, ops, attention, models or sanitizer, not '${2:-}'" >&2; exit 2 ;;
      esac ;;
    -h|--help) sed -n '2,10p' "$0" | cut -c3-; exit 0 ;;
    -*) echo "gpu.sh: unknown option $1; see --help" >&2; exit 2 ;;
    *) out="$1" ;;
  esac
  shift
done
root="$(cd "$(dirname "$0")/.." && pwd)"
mkdir -p "${out:-gpu-results}" || exit 2
out="$(cd "${out:-gpu-results}" && pwd)"
python="${PYTHON:-python3}"
work="$(mktemp -d)"
summary="$out/summary.txt"
for name in conformance.txt tests.txt ops.txt ops.jsonl train.jsonl generate.jsonl; do : > "$out/$name"; done
: > "$summary"
wants() { [ -z "$only" ] || [[ " $only " == *" $1 "* ]]; }
left() { echo $((limit - SECONDS)); }
say() { echo "$*" | tee -a "$summary"; }

finish() {
  trap - EXIT INT TERM
  {
    echo
    grep -E "FAILED|[1-9][0-9]* differ" "$out/conformance.txt" | cut -c1-160 | head -n 15
    tail -n 1 "$out/tests.txt"
    grep -E "^(FAILED|ERROR)" "$out/tests.txt" | cut -c1-160 | head -n 15
    grep "tokens/s" "$out/ops.txt"
    (cd "$work" && "$python" -m benchmarks.tables "$out/ops.jsonl" 2>/dev/null)
    echo "$SECONDS s; everything is in $out"
  } | tee -a "$summary"
  rm -rf "$work"
}
trap finish EXIT
stop() {
  trap - INT TERM
  say "stopped after $SECONDS s"
  if [ -n "$job" ]; then kill -INT "$job" 2>/dev/null; wait "$job" 2>/dev/null; fi
  exit 130
}
trap stop INT TERM

# From here on nothing is read from the checkout but tests and benchmarks: fastlm is the installed one.
unset TRITON_INTERPRET
export PYTHONPATH="$work/site:$root" OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
cd "$work" || exit 2

install() {
  local source="${wheel:-$work/source}"
  if [ -z "$wheel" ]; then
    mkdir "$work/source" # a copy: the build must leave nothing in the checkout
    (cd "$root" && cp -r pyproject.toml setup.py README.md LICENSE MANIFEST.in fastlm kernels csrc "$work/source")
  fi
  FASTLM_CUDA=$((1 - dry)) "$python" -m pip install --quiet --no-deps --no-index --no-build-isolation --target "$work/site" "$source"
}
if install >"$work/install.txt" 2>&1; then
  say "installed ${wheel:-the checkout} into a temporary folder ($SECONDS s)"
else
  say "the install failed, the checkout is used as it is: $(tail -n 1 "$work/install.txt")"
fi
"$python" - <<'PYTHON' 2>&1 | tee -a "$summary"
import torch, fastlm
from benchmarks.machine import machine
from fastlm.ops import _cuda
print(f"fastlm from {fastlm.__file__}")
print(f"CUDA kernels: {_cuda.unavailable() or 'loaded'}")
print("  ".join(f"{k}: {v}" for k, v in machine("cuda" if torch.cuda.is_available() else "cpu").items() if k != "kind"))
PYTHON
if [ $dry = 0 ] && ! "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  say "gpu.sh: torch sees no CUDA GPU; --dry rehearses on a CPU"
  exit 1
fi

tests=("$root/tests/ops") kernels=("$root/tests/csrc" "$root/tests/test_cuda_library.py") workers=12 suite=quick options=(--no-page)
if [ $dry = 1 ]; then
  tests=("$root/tests/ops/test_rms_norm.py") workers=2 suite=tiny options+=(--provider fastlm:torch)
fi

# -o pythonpath= : pyproject.toml puts the checkout first, and the installed package is what is tested.
pytest=("$python" -m pytest -q -c "$root/pyproject.toml" --rootdir "$root" -o pythonpath= -p no:cacheprovider)

check() {
  local parallel=()
  "$python" -c "import xdist" 2>/dev/null && parallel=(-n "$workers")
  # pytest-xdist needs up to 20 s to collect its workers and sum up.
  timeout --signal=INT --kill-after=30 "$tests_limit" "${pytest[@]}" "${tests[@]}" "${parallel[@]}" -m "not slow" \
    >"$out/tests.txt" 2>&1 &
  job=$!
  wait "$job"
  say "tests: exit status $? ($SECONDS s)"
  timeout --signal=INT --kill-after=10 60 "${pytest[@]}" "${kernels[@]}" -m gpu >>"$out/tests.txt" 2>&1 &
  job=$!
  wait "$job"
  say "tests of CUDA kernels: exit status $? ($SECONDS s)"
}

# At most 40 cases under each tool: instructions are patched, and run some hundred times slower.
sanitize() {
  command -v compute-sanitizer >/dev/null || { say "sanitizer: there is no compute-sanitizer in PATH"; return; }
  local tool
  for tool in memcheck racecheck; do
    timeout --signal=INT --kill-after=10 240 compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "${pytest[@]}" "${kernels[@]}" -m gpu -k "not conformance and not graph and not averages" >>"$out/tests.txt" 2>&1 &
    job=$!
    wait "$job"
    say "$tool: exit status $? ($SECONDS s)"
  done
}

# The instructions of the device layer on this GPU against their host body; a kernel that waits for ever costs no more than this.
conform() {
  local arguments=()
  [ $dry = 1 ] && arguments=(--dry)
  timeout --signal=INT --kill-after=5 150 "$python" -m tests.csrc.conformance "${arguments[@]}" >"$out/conformance.txt" 2>&1 &
  job=$!
  wait "$job"
  say "conformance: exit status $? ($SECONDS s): $(tail -n 1 "$out/conformance.txt" | cut -c1-160)"
}

# timed NAME MODULE OPTIONS...: one process for each: a kernel that breaks the GPU's context costs one of them.
timed() {
  local name="$1"
  shift
  [ "$(left)" -gt 20 ] || { say "out of time before $name"; return; }
  timeout --signal=INT --kill-after=5 "$(($(left) - 10))" "$python" -m "$@" --out "$out" >>"$out/ops.txt" 2>"$work/errors.txt" &
  job=$!
  wait "$job" || say "$name: exit status $?: $(tail -n 1 "$work/errors.txt" | cut -c1-160)"
}
measure() { timed "$1" benchmarks run --op "$@" --suite "$suite" "${options[@]}"; }

# First every op without torch.compile, whose own compiling takes most of the time; then the models; then every op with it, as far as
# time allows; last attention beside FlexAttention, which is torch.compile too. The table takes the latest pass there is, so that
# what it compares was measured in one process.
wants conformance && conform
wants correctness && check
[[ " $only " == *" sanitizer "* ]] && sanitize
ops=""
for op in $("$python" -m benchmarks run --list); do
  case "$op" in
    *attention*|append_kv) wants attention || wants ops && ops="$ops $op" ;;
    *) wants ops && ops="$ops $op" ;;
  esac
done
for op in $ops; do measure "$op" --skip torch.compile --skip compiled --skip flex; done
if wants models; then
  training=(--seconds 8) decoding=(--seconds 8)
  if [ $dry = 1 ]; then
    training=(--seconds 0.1 --model gpt2-4x128 --dtype fp32 --batch 2 --context 32)
    decoding=(--seconds 0.1 --model gpt2-4x128 --dtype fp32 --prompt 4 --new 8)
  fi
  timed training benchmarks.models.bench_train "${training[@]}"
  timed decoding benchmarks.models.bench_generate "${decoding[@]}"
fi
for op in $ops; do
  [ "$op" = attention ] || measure "$op"
done
[[ " $ops " == *" attention "* ]] && measure attention
exit 0
