#!/usr/bin/env bash
# tests/run.sh PYTHON [options of pytest]: every folder of tests/ in a process of its own.
#
# torch, TensorRT, OpenVINO and ONNX Runtime bring thread pools and allocators of their own, and what one of them leaves
# behind must not decide about the tests of another. Most tests keep one core busy, so JOBS folders run side by side;
# those that measure time or serve under load come after them, alone. JOBS=1 runs one at a time.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTEST_PYTHON=$1
shift
first=(tests/export/ tests/training/) # the longest
alone=(tests/serving/ tests/measure/)
failed=$(mktemp)
export failed
trap 'rm -f "$failed"' EXIT

part() {
  set -o pipefail # a child of xargs does not inherit it
  local folder=$1
  shift
  # shellcheck disable=SC2086 # a pattern of files is to be expanded
  "$PYTEST_PYTHON" -m pytest "$@" $folder 2>&1 | sed -u "s|^|${folder%/}: |" || echo "$folder" >>"$failed"
}
export -f part

rest=()
for folder in tests/*/ 'tests/test_*.py'; do
  case " ${first[*]} ${alone[*]} tests/gpu/ tests/__pycache__/ " in *" $folder "*) ;; *) rest+=("$folder") ;; esac
done
printf '%s\n' "${first[@]}" "${rest[@]}" | xargs -P "${JOBS:-2}" -I{} bash -c 'part "$@"' _ {} "$@"
for folder in "${alone[@]}"; do part "$folder" "$@"; done

if [ -s "$failed" ]; then
  echo "failed: $(tr '\n' ' ' <"$failed")"
  exit 1
fi
