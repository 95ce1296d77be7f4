#!/bin/sh
# Tests with the least versions that pyproject.toml allows (constraints-least.txt), in an environment of its own:
#   sh scripts/least_versions.sh [files of tests]
# PYTHON is the Python to make it with (3.11 is the least), VENV where it goes, TORCH the torch to test: 2.10.0 is the least; where there is
# no such build, for example TORCH=2.13.0.
set -eu
cd "$(dirname "$0")/.."
VENV="${VENV:-.venv-least}"
"${PYTHON:-python3.11}" -m venv "$VENV"
"$VENV/bin/pip" install -q -c constraints-least.txt "torch==${TORCH:-2.10.0}" -e '.[test,tensorboard]'
"$VENV/bin/python" -m pip list 2>/dev/null | grep -i -E '^(accelerate|diffusers|numpy|pillow|pyyaml|rich|safetensors|torch|transformers|peft) '
if [ $# -eq 0 ]; then
  set -- tests/test_train.py tests/test_distributed.py tests/test_checkpoint.py tests/test_reliability.py tests/test_data.py tests/test_cli.py \
    tests/test_backbone.py tests/test_export.py tests/test_optimizers.py tests/test_samples_folder.py tests/test_several_commands.py
fi
exec "$VENV/bin/python" -m pytest "$@"
