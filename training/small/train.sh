#!/usr/bin/env bash
# The small model from nothing, into small/packed. Each step goes on where it was killed; those that are done are skipped.
# SAM 2 is trained on one core beside vision and language model on another; the recipe's two parts use both.
#   bash training/small/train.sh [FOLDER]
set -euo pipefail
scripts=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:-.}" && cd "${1:-.}"
export ACCELERATE_USE_CPU=${ACCELERATE_USE_CPU:-true} OMP_NUM_THREADS=1

script() { python -m "sa2va_i.training.small.$1" "${@:2}"; }

([ -d small/sam2/sam2 ] || script train_sam2 small/sam2) &
[ -d small/vision/vision ] || script train_vision small/vision
[ -d small/untrained ] || script build small/vision/vision small/untrained
[ -d small/places/places ] || script train_places small/untrained small/places
[ -d small/words/words ] || script train_words small/places small/words
wait $!
[ -d small/joined ] || script join small/words/words small/sam2/sam2 small/joined
for stage in masks together; do
    out=$([ $stage = masks ] && echo small/masks || echo small/model)
    [ -d $out ] || torchrun --nproc_per_node "${PROCESSES:-2}" -m sa2va_i.cli train "$scripts/$stage.yaml"
done
[ -d small/packed ] || script pack small/model small/packed
script evaluate_sam2 small/packed
