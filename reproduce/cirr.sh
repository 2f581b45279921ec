#!/usr/bin/env bash
# CLIP4Cir (RN50x4) and the mixture of experts on CIRR: both stages, validation, the files for the test server, and a
# table next to published numbers. docs/reproduce.md explains the variables of reproduce/common.sh.
#
#     bash reproduce/cirr.sh
#     SMOKE=1 OUT=/tmp/smoke bash reproduce/cirr.sh       # every command on synthetic data, in two minutes
#
# Time and memory, estimated by src/plan.py (computed, not measured; without decoding of images, which can take longer):
#
#     GPU              stage 1, 100 epochs            stage 2, mixture             stage 2, plain
#     T4, 16 GB        12 h 09 min, 12.8 GiB*         13 min, 8.7 GiB*             8 min, 1.8 GiB
#     RTX 4090, 24 GB  4 h 27 min, 12.8 GiB*          2 min, 14.4 GiB              1 min, 1.8 GiB
#     A100, 40 GB      2 h 11 min, 21.5 GiB           4 min, 14.4 GiB              3 min, 1.8 GiB
#     H100, 80 GB      40 min, 21.5 GiB               1 min, 14.4 GiB              0 min, 1.8 GiB
#     * T4 and RTX 4090: with EXTRA_1="--micro-batch-size 64"
#     * T4: with EXTRA_2="--batch-size 2048"
set -euo pipefail
cd "$(dirname "$0")/.."
dataset=CIRR
batch_2=4096
source reproduce/common.sh

both_stages tuned_clip_arithmetic combiner_arithmetic
run src/cirr_test_submission.py --submission-name reproduced "${pair[@]}" "${data[@]}" --output-dir "$OUT/submission"
run src/check_submission.py "$OUT"/submission/recall*_reproduced.json --data-root "$DATA"
run reproduce/table.py "${results[@]}"
