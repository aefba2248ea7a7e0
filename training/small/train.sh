#!/usr/bin/env bash
# The small model from nothing, into small/model. Each step goes on where it was killed; those that are done are skipped.
#   bash training/small/train.sh [FOLDER]
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:-.}" && cd "${1:-.}"
[ -d small/sam2/sam2 ] || python -m sa2va_i.training.small.train_sam2 small/sam2
[ -d small/vision/vision ] || python -m sa2va_i.training.small.train_vision small/vision
[ -d small/untrained ] || python -m sa2va_i.training.small.build small/sam2/sam2 small/vision/vision small/untrained
export ACCELERATE_USE_CPU=${ACCELERATE_USE_CPU:-true}
for stage in words masks; do
    out=$([ $stage = words ] && echo small/words || echo small/model)
    [ -d $out ] || torchrun --nproc_per_node "${PROCESSES:-2}" -m sa2va_i.cli train "$scripts/$stage.yaml"
done
python -m sa2va_i.training.small.evaluate_sam2 small/model
