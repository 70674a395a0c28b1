#!/usr/bin/env bash
# Builds the CUDA kernels and checks and times them on the GPU at hand: bash scripts/gpu_check.sh [--checks] [--json FILE]
# Then decoding of a whole 8B model beside bfloat16 (scripts/bench_decode_gpu.py), unless --checks.
# PYTHON names the interpreter. Needs nvcc and a torch with CUDA; no GPU: one line, exit code 2.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} COMPRESS_CUDA_KERNELS=1

if ! architecture=$("$python" scripts/gpu_check.py --architecture); then exit 2; fi  # it has said why
case $architecture in
  80 | 86 | 89 | 90a) "$python" -m compress.kernels.cuda.build --folder build/cuda/objects --arch "$architecture" ;;
  *) "$python" -m compress.kernels.cuda.build --folder build/cuda/objects ;;  # a newer one compiles the PTX
esac
failed=()
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck initcheck; do
    echo "compute-sanitizer $tool"
    # each tensor an allocation of its own: within torch's pools an access beside a tensor would not be seen
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 3 --kernel-regex kns=_kernel \
      "$python" scripts/gpu_check.py --sanitize || failed+=("$tool")
  done
else
  echo "compute-sanitizer is not there: races and bounds are not looked at"
fi
"$python" scripts/gpu_check.py --json "out/gpu_check.json" ${failed[@]+--failed "${failed[@]}"} "$@"
case " $* " in
  *" --checks "*) ;;
  *) "$python" scripts/bench_decode_gpu.py ;;
esac
