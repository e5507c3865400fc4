#!/usr/bin/env bash
# On a machine with a GPU: GPU tests, then benchmarks, most valuable first, within LIMIT seconds. Started again with the
# same OUT and the same commit it skips the stages that passed, and in a benchmark the cases that have a row.
#
#     OUT=benchmarks/results scripts/gpu_check.sh
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/results}
LIMIT=${LIMIT:-570}
PYTHON=${PYTHON:-python3}
export OUT PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
COMMIT=$(git describe --always --dirty --exclude='*' 2>/dev/null || echo unknown)
failed=0

stage() { # name, command...
  local name=$1 left=$((LIMIT - SECONDS)) status
  shift
  if grep -qsx "$name passed at $COMMIT" "$OUT/gpu_check.log"; then echo "== $name: passed before"; return; fi
  if [ "$left" -lt 15 ]; then echo "== $name: no time left, run again"; failed=1; return; fi
  echo "== $name ($left s left)"
  timeout "$left" "$@"
  status=$?
  [ $status -eq 0 ] && echo "$name passed at $COMMIT" >>"$OUT/gpu_check.log" || { echo "== $name: FAILED ($status)"; failed=1; }
}

stage environment "$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no GPU"; print(torch.__version__, torch.cuda.get_device_name())'
stage build "$PYTHON" -m aotrain._build
stage tests "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider tests/kernels tests/ops tests/nn tests/optim
benchmark() { # name, repeats
  local left=$((LIMIT - SECONDS - 10))
  stage "$1" "$PYTHON" -m benchmarks.run "$1" --repeats "$2" --resume --limit "$left"
}

benchmark float8 20
benchmark moe 20
benchmark optim 30
benchmark routing 20
benchmark scaled_cast 20
benchmark nvfp4 20
exit $failed
