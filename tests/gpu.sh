#!/bin/sh
# All that must be looked at where there is a GPU, in one go: tests/gpu.sh [DEVICE]
# Prints tables to paste into docs/performance.md; exit code 1 where a check does not hold.
set -u
device=${1:-cuda}
cd "$(dirname "$0")/.." || exit 2
python=.venv/bin/python
[ "$device" = cpu ] || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
$python -m tests.gpu "$device"
failed=$?
size=${SIZE:-"--student wrn-28-10,vit-b-2 --batch 128"}
$python -m dra_ray bench step $size --rounds 5 --device "$device"
$python -m dra_ray bench teacher edm-cifar10-7m edm-cifar10 --device "$device"
[ "$failed" = 0 ]
