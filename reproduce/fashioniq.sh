#!/usr/bin/env bash
# CLIP4Cir (RN50x4) and the mixture of experts on FashionIQ: both stages, validation, predictions for the test split,
# and a table next to published numbers. docs/reproduce.md explains the variables of reproduce/common.sh.
#
#     bash reproduce/fashioniq.sh
#     SMOKE=1 OUT=/tmp/smoke bash reproduce/fashioniq.sh  # every command on synthetic data, in two minutes
#
# Time and memory, estimated by src/plan.py (computed, not measured; without decoding of images, which can take longer):
#
#     GPU              stage 1, 100 epochs            stage 2, mixture             stage 2, plain
#     T4, 16 GB        12 h 58 min, 12.8 GiB*         25 min, 8.9 GiB              19 min, 1.6 GiB
#     RTX 4090, 24 GB  3 h 20 min, 12.8 GiB*          3 min, 8.9 GiB               2 min, 1.6 GiB
#     A100, 40 GB      3 h 34 min, 21.5 GiB           9 min, 8.9 GiB               7 min, 1.6 GiB
#     H100, 80 GB      1 h 04 min, 21.5 GiB           2 min, 8.9 GiB               2 min, 1.6 GiB
#     * T4 and RTX 4090: with EXTRA_1="--micro-batch-size 64"
set -euo pipefail
cd "$(dirname "$0")/.."
dataset=FashionIQ
batch_2=2048
source reproduce/common.sh

both_stages tuned_clip_best combiner
run src/fashioniq_test_submission.py --submission-name reproduced "${pair[@]}" "${data[@]}" \
    --output-dir "$OUT/submission"
run reproduce/table.py "${results[@]}"
