#!/usr/bin/env bash
# Everything that only a CUDA device can show, in ten minutes: tests, trainings, benchmarks, the 24 GB run, NCCL.
#
#   scripts/first_gpu_run.sh [FOLDER]         on the first CUDA device
#   scripts/first_gpu_run.sh --cpu [FOLDER]   the same commands with tiny sizes on a CPU, to test this script
#
# FOLDER (default benchmarks/results/first_gpu_run) gets a log per part, the benchmarks' JSON and summary.txt.
# A failed part does not stop the others. Exit code: 0 if all parts passed, otherwise 1.
# PYTHON is the interpreter (default .venv/bin/python); molf, pytest and, on a GPU, triton are installed there.
set -uo pipefail
cd "$(dirname "$0")/.."

on_cpu=""
if [ "${1:-}" = --cpu ]; then
  on_cpu=yes
  shift
fi
out=${1:-benchmarks/results/first_gpu_run}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
: > "$out/summary.txt"
status=0

# part NAME SECONDS COMMAND...: run a command with a time limit, keep its output, add a line to the summary.
part() {
  local name=$1 limit=$2 started=$SECONDS code=0
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 || code=$?
  local result="ok"
  if [ "$code" = 124 ] || [ "$code" = 137 ]; then
    result="over its limit of $limit s"
  elif [ "$code" != 0 ]; then
    result="failed with exit code $code"
  fi
  [ "$result" = ok ] || { status=1 && tail -n 15 "$out/$name.log"; }
  echo "$name: $result, $((SECONDS - started)) s" | tee -a "$out/summary.txt"
}

# train NAME OPTION...: a run of the embedded task; its folder is removed, because the log has its metrics.
train() {
  local name=$1
  shift
  part "train-$name" 150 "$python" -m molf train --output_dir "$out/run-$name" --overwrite "${steps[@]}" "$@"
  rm -rf "$out/run-$name"
}

if [ -n "$on_cpu" ]; then
  export CUDA_VISIBLE_DEVICES=""
  steps=(--task demo-med --max_steps 2 --max_samples 8 --max_eval_samples 4)
  kernels=(--kernels eager)
  offload=()
  backend=gloo
  bench=(--smoke --capped "" --json "$out/gpu.json")
  cap=(--smoke --models "" --json "$out/gpu-24gb.json")
else
  steps=(--max_steps 70)
  kernels=(--kernels triton)
  offload=(--state_offload)
  backend=nccl
  bench=(--models 1.5b --capped "" --rounds 3 --steps 3 --json "$out/gpu.json")
  cap=(--models "" --capped 3b,8b --json "$out/gpu-24gb.json")
fi

part environment 60 "$python" -c '
import platform, torch, transformers, trl, peft
print(platform.platform(), platform.python_version())
for module in (torch, transformers, trl, peft): print(module.__name__, module.__version__)
print("cuda", torch.version.cuda, [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])
'
# Kernels and offload against the eager path, bit for bit or within the tests' bounds.
# Only files with such tests, because collecting all of them takes half a minute.
part tests 240 "$python" -m pytest -m gpu -p no:xdist -rs --durations=10 $(grep -rlF "mark.gpu" --include="test_*.py" tests)
train fft --method fft "${kernels[@]}"
train molf --method molf "${kernels[@]}"
train molf-eager --method molf --kernels eager
train molf-offload --method molf "${offload[@]}"
train molf-e --method molf-e
part world-of-one 90 "$python" scripts/world_of_one.py "$backend"
part bench 240 "$python" benchmarks/gpu.py "${bench[@]}"
part bench-24gb 150 "$python" benchmarks/gpu.py "${cap[@]}"
[ -n "$on_cpu" ] || part step-kernels 120 "$python" benchmarks/step_kernels_gpu.py --json "$out/step_kernels_gpu.json"

echo
cat "$out/summary.txt"
exit "$status"
