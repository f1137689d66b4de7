#!/usr/bin/env bash
# Tests and measures fastlm on a GPU machine that has its own torch and triton and no network, within nine minutes.
#
#   benchmarks/gpu.sh [--dry] [--wheel FILE] [--seconds N] [--only conformance|correctness|ops|attention|models|sanitizer]...
#                    [OUTDIR]
#
# Nine minutes do not hold all of it. A plain call does what fits, in order of worth: the instructions of csrc/device against their
# host body, the op tests of the hot ops compiled, the CUDA kernels' tests, every op without torch.compile, models, and with what is
# left the ops beside torch.compile. All of it takes two calls: --only correctness (every op test), then --only ops --only models.
# It installs the checkout (or FILE: a wheel that brings the CUDA kernels saves their build) without dependencies into a temporary
# folder. --only takes a part (several allowed); sanitizer, the CUDA kernels under compute-sanitizer, runs only so. OUTDIR (default
# gpu-results) gets summary.txt, tests.txt (install, conformance, tests), ops.txt, ops.jsonl, train.jsonl and generate.jsonl; what is
# there is kept if the run is stopped. A short table comes last; `python -m benchmarks report OUTDIR` makes the page. --dry walks the
# same path on a CPU with tiny sizes; --seconds takes another limit than 525.
set -uo pipefail
set -m # else bash lets background jobs ignore the SIGINT by which pytest is asked to stop and sum up

limit=525 job=""
dry=0 wheel="" out="" only=""
while [ $# -gt 0 ]; do
  case "$1" in
    --dry) dry=1 ;;
    --wheel) wheel="$(realpath "$2")"; shift ;;
    --seconds) limit="$2"; shift ;;
    --only)
      case "${2:-}" in
        conformance|correctness|ops|attention|models|sanitizer) only="$only $2"; shift ;;
        *) echo "gpu.sh: --only takes conformance, correctness, ops, attention, models or sanitizer, not '${2:-}'" >&2; exit 2 ;;
      esac ;;
    -h|--help) sed -n '2,14p' "$0" | cut -c3-; exit 0 ;;
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
summary="$out/summary.txt" tests="$out/tests.txt" ops="$out/ops.txt"
for name in summary.txt tests.txt ops.txt ops.jsonl train.jsonl generate.jsonl; do : > "$out/$name"; done
wants() { [ -z "$only" ] || [[ " $only " == *" $1 "* ]]; }
say() { echo "$*" | tee -a "$summary"; }
# What each part needs to be of use, in their order, in seconds.
parts=(conformance op_tests kernel_tests attention ops models) needs=(60 60 50 50 110 90)
wanted() {
  case "$1" in
    *_tests) wants correctness ;;
    attention) wants attention || wants ops ;;
    *) wants "$1" ;;
  esac
}
# share CAP PART [RESERVE]: seconds for a part: its own limit, or what is left but for the reserve and the needs of those after it.
share() {
  local seconds=$((limit - SECONDS - ${3:-0})) after=0 i
  [ "$2" = install ] && after=1
  for i in "${!parts[@]}"; do
    [ $after = 1 ] && wanted "${parts[i]}" && seconds=$((seconds - needs[i]))
    [ "${parts[i]}" = "$2" ] && after=1
  done
  [ $dry = 1 ] && { echo 600; return; } # a rehearsal is to reach every part, on a slow machine too
  seconds=$((seconds < $1 ? seconds : $1))
  echo $((seconds > 5 ? seconds : 5))
}
# Parts of tests.txt: begin NAME starts one, part NAME prints it.
begin() { echo "=== $1" >>"$tests"; }
part() { awk -v name="=== $1" '/^=== [a-z]/ { on = ($0 == name) } on' "$tests"; }
# job SECONDS COMMAND...: runs it, for at most so long; the caller says where its output goes.
job() {
  timeout --signal=INT --kill-after=15 "$@" &
  job=$!
  wait "$job"
}
# ended STATUS: in words.
ended() {
  case "$1" in
    0) echo "passed" ;;
    124|137) echo "stopped at its limit" ;;
    *) echo "exit status $1" ;;
  esac
}

finish() {
  trap - EXIT INT TERM
  {
    echo
    part conformance | grep -E "FAILED|HUNG|[1-9][0-9]* differ" | cut -c1-160 | head -n 15
    for name in "op tests" "kernel tests"; do
      part "$name" | grep -E "^(FAILED|ERROR)|^worker .* crashed|broke the GPU" | cut -c1-160 | sort -u | head -n 15
      part "$name" | grep -E "^(=+ )?(no tests ran|[0-9]+ [a-z]+.*) in [0-9.]+s" | tail -n 1 | sed "s/^/$name: /"
    done
    grep "tokens/s" "$ops"
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
export PYTHONPATH="$work/site:$root" OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
[ -w "${HOME:-/nowhere}" ] || export HOME="$work" TRITON_CACHE_DIR="$work/triton" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
cd "$work" || exit 2

install() {
  local source="${wheel:-$work/source}"
  if [ -z "$wheel" ]; then
    mkdir "$work/source" # a copy: the build must leave nothing in the checkout
    (cd "$root" && cp -r pyproject.toml setup.py README.md LICENSE MANIFEST.in fastlm kernels csrc "$work/source")
  fi
  FASTLM_CUDA=$((1 - dry)) job "$(share 150 install)" \
    "$python" -m pip install --quiet --no-deps --no-index --no-build-isolation --target "$work/site" "$source" >>"$tests" 2>&1
}
if [ "$only" = " conformance" ]; then
  say "nothing is installed: conformance reads the checkout alone"
else
  begin install
  if install; then
    say "installed ${wheel:-the checkout} into a temporary folder ($SECONDS s)"
  else
    say "the install failed ($(ended $?), $SECONDS s); on with the checkout as it is, $(
      [ -z "$wheel" ] && echo "without CUDA kernels unless they were built into it" || echo "without $wheel"):"
    part install | grep -iE "error|fatal" | cut -c1-200 | head -n 8 | tee -a "$summary"
  fi
fi
"$python" - $dry <<'PYTHON' 2>&1 | tee -a "$summary"
import sys, torch, fastlm
from benchmarks.machine import machine
from fastlm.ops import _cuda
dry, gpu = sys.argv[1] == "1", torch.cuda.is_available()
print(f"fastlm from {fastlm.__file__}")
print(f"CUDA kernels: {_cuda.unavailable() or 'loaded'}")
print("  ".join(f"{k}: {v}" for k, v in machine("cuda" if gpu else "cpu").items() if k != "kind"))
if not gpu and not dry:
    sys.exit("gpu.sh: torch sees no CUDA GPU; --dry rehearses on a CPU")
PYTHON
[ "${PIPESTATUS[0]}" = 0 ] || exit 1

# The instructions of the device layer on this GPU against their host body.
conform() {
  local arguments=()
  [ $dry = 1 ] && arguments=(--dry)
  begin conformance
  job "$(share 100 conformance)" "$python" -m tests.csrc.conformance "${arguments[@]}" >>"$tests" 2>&1
  say "conformance: $(ended $?) ($SECONDS s): $(part conformance | tail -n 1 | cut -c1-160)"
}

# -o pythonpath= : pyproject.toml puts the checkout first, and the installed package is what is tested. A test that hangs ends its
# process after a minute (two where there is time: its kernels are compiled in it); a process that ended is replaced, 24 times.
hang=60
[ -n "$only" ] && hang=120
[ $dry = 1 ] && hang=600
pytest=("$python" -m pytest -q --tb=short -c "$root/pyproject.toml" --rootdir "$root" -o pythonpath= -o "faulthandler_timeout=$hang"
  -p no:cacheprovider --continue-on-collection-errors)
parallel() { "$python" -c "import xdist" 2>/dev/null && echo "-n $1 --max-worker-restart 24 --maxschedchunk 4"; }
hot=(rms_norm layer_norm softmax rotary activation attention decode_attention append_kv linear_cross_entropy cross_entropy adamw mlp)
# test_conformance.py's test on a GPU is what `conform` has run.
kernels=("$root/tests/csrc" "$root/tests/test_cuda_library.py" -m gpu --deselect "tests/csrc/test_conformance.py::test_on_a_gpu")

check() {
  local files=("$root/tests/ops") workers=12 seconds=400
  [ -z "$only" ] && files=("${hot[@]/#/$root/tests/ops/test_}") && files=("${files[@]/%/.py}") && seconds=120
  [ $dry = 1 ] && files=("$root/tests/ops/test_linear.py") workers=2
  begin "op tests"
  # shellcheck disable=SC2046
  job "$(share "$seconds" op_tests)" "${pytest[@]}" "${files[@]}" $(parallel $workers) -m "not slow" >>"$tests" 2>&1
  say "op tests$([ -z "$only" ] && echo " (hot ops)"): $(ended $?) ($SECONDS s)"
  begin "kernel tests"
  # shellcheck disable=SC2046
  job "$(share 120 kernel_tests)" "${pytest[@]}" "${kernels[@]}" $(parallel $((dry ? 1 : 4))) >>"$tests" 2>&1
  say "kernel tests: $(ended $?) ($SECONDS s)"
}

# At most 40 cases under each tool: instructions are patched, and run some hundred times slower.
sanitize() {
  command -v compute-sanitizer >/dev/null || { say "sanitizer: there is no compute-sanitizer in PATH"; return; }
  local tool
  for tool in memcheck racecheck; do
    begin "$tool"
    job "$(share 240 models)" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "${pytest[@]}" -o faulthandler_timeout=240 "${kernels[@]}" -k "not graph and not averages" >>"$tests" 2>&1
    say "$tool: $(ended $?) ($SECONDS s)"
  done
}

# timed NAME SECONDS MODULE OPTIONS...; says at which cell it ended if it did not end well.
timed() {
  local name="$1" seconds="$2" before status
  shift 2
  [ "$seconds" -gt 15 ] || { say "out of time before $name"; return; }
  before="$(wc -l <"$ops")"
  job "$seconds" "$python" -m "$@" --out "$out" --rates "$work/rates.json" >>"$ops" 2>&1
  status=$?
  [ $status = 0 ] && return
  say "$name: $(ended $status) ($SECONDS s)"
  tail -n "+$((before + 1))" "$ops" | awk '
    / [0-9]+\/[0-9]+(, [0-9]+ s left)?: / { cell = $0; last = ""; next }
    /^[a-z0-9_]+: (exit status|stopped after|not begun)/ { print "  " $0 (cell ? ", at" cell : ""); if (last) print "    " last
                                                           cell = last = ""; next }
    NF { last = $0 }
    END { if (cell) print "  at" cell; if (last) print "    " last }' | cut -c1-200 | tail -n 12 | tee -a "$summary"
}
# measure NAME SECONDS SECONDS_OF_AN_OP "OPS" OPTIONS...: a process for each op; one that hangs costs its own seconds.
measure() {
  local name="$1" seconds="$2" each="$3" chosen=() op
  for op in $4; do chosen+=(--op "$op"); done
  shift 4
  [ ${#chosen[@]} = 0 ] && return
  timed "$name" "$seconds" benchmarks run "${chosen[@]}" "$@" "${options[@]}" --no-page --apart "$each" --limit "$((seconds - 10))"
}
model() {
  local name="$1" each=60 training=(--seconds 5 --model "$1" --dtype bf16) decoding=(--seconds 5 --model "$1" --dtype bf16)
  [ "$only" = " models" ] && each=120 && training+=(--dtype fp32) && decoding+=(--dtype fp32)
  if [ $dry = 1 ]; then
    training=(--seconds 0.1 --model "$1" --dtype fp32 --batch 2 --context 32)
    decoding=(--seconds 0.1 --model "$1" --dtype fp32 --prompt 4 --new 8)
  fi
  local -x OMP_NUM_THREADS=$((($(nproc) + 1) / 2)) # weights are made on the CPU
  timed "training $name" "$(share "$each" models 30)" benchmarks.models.bench_train "${training[@]}"
  timed "decoding $name" "$(share "$each" models)" benchmarks.models.bench_generate "${decoding[@]}"
}

options=(--suite quick --device cuda) models=(gpt2 llama-3.2-1b)
[ $dry = 1 ] && options=(--suite tiny --device cpu --provider fastlm:torch) && models=(gpt2-4x128)
wants conformance && conform
wants correctness && check
[[ " $only " == *" sanitizer "* ]] && sanitize
attention="" others="" # the hot ones first
for op in "${hot[@]}" $(cd "$root/benchmarks/ops" && printf '%s\n' bench_*.py | sed 's/bench_//; s/\.py//'); do
  [[ " $attention $others " == *" $op "* ]] && continue
  case "$op" in
    *attention*|append_kv) wants attention || wants ops && attention="$attention $op" ;;
    *) wants ops && others="$others $op" ;;
  esac
done
# First every op without what torch compiles, whose compiling takes most of the time; then models; then, as far as the time goes,
# what torch compiles beside our own kernels, so that what the table compares was measured in one process: the latest counts there.
measure "attention" "$(share 120 attention)" 60 "$attention" --no-compiled
measure "ops" "$(share 400 ops)" 40 "$others" --no-compiled
if wants models; then for name in "${models[@]}"; do model "$name"; done; fi
[ $dry = 1 ] && others="${others:+softmax}" attention=""
measure "ops beside torch.compile" "$(share 400 models)" 60 "$others" --compiled
measure "attention beside torch.compile" "$(share 400 models)" 120 "$attention" --compiled
exit 0
