# What both scripts share: settings, and functions that run a step. Sourced from the project's folder.
# Variables: PYTHON, DATA (the data root), OUT (the folder of all results), SEEDS of stage 2, EXTRA_1 and EXTRA_2
# (further flags of stage 1 and stage 2). SMOKE=1 runs every command on synthetic data with a tiny CLIP.
PYTHON=${PYTHON:-python}
OUT=${OUT:-reproduced}
read -ra SEEDS <<< "${SEEDS:-0}"
read -ra EXTRA_1 <<< "${EXTRA_1:-}"
read -ra EXTRA_2 <<< "${EXTRA_2:-}"

run() {
    echo "\$ python $*"
    "$PYTHON" "$@"
}

# train FOLDER SCRIPT FLAGS: a training in a folder of its own, resumed if there is one. The run's folder is $TRAINED.
train() {
    local folder=$1 script=$2
    shift 2
    if compgen -G "$folder/*/" > /dev/null; then
        run "src/$script" --resume "$(echo "$folder"/*/)"
    else
        run "src/$script" "${common[@]}" "$@" --output-dir "$folder"
    fi
    TRAINED=$(echo "$folder"/*/)
    TRAINED=${TRAINED%/}
}

if [ "${SMOKE:-}" = 1 ]; then
    DATA=$OUT/data
    if ! [ -d "$DATA" ]; then
        run src/emoji_dataset.py --output-dir "$DATA" --layouts CIRR FashionIQ --concepts 4 --side 32 \
            --train-triplets 8 --eval-queries 4
    fi
    clip=(--clip-model-name "$DATA/tiny_clip_vit.pt")
    stage_1=(--num-epochs 1 --learning-rate 1e-4 --batch-size 16)
    stage_2=(--num-epochs 1 --combiner-lr 1e-3 --batch-size 16 --projection-dim 16 --hidden-dim 16)
    workers=(--num-workers 0)
    check=(--unofficial)
else
    DATA=${DATA:-.}
    clip=(--clip-model-name RN50x4)
    stage_1=(--num-epochs 100 --learning-rate 2e-6 --batch-size 128)
    stage_2=(--num-epochs 300 --combiner-lr 2e-5 --batch-size "$batch_2" --projection-dim 2560 --hidden-dim 5120)
    workers=()
    check=()
fi
data=(--data-root "$DATA" "${workers[@]}")
common=(--dataset "$dataset" "${data[@]}" --validation-frequency 1 --save-training --save-best)

# both_stages BEST_CLIP BEST_COMBINER: check the data, train stage 1 and both Combiners, measure the sum of stage 1.
# Leaves the results in $results and the flags of the last mixture in $pair.
both_stages() {
    local kind weights=$1 combiner=$2
    run src/check_dataset.py --dataset "$dataset" "${data[@]}" "${check[@]}" || [ $? = 1 ] # 1: usable, with findings
    train "$OUT/$dataset/clip" clip_fine_tune.py "${clip[@]}" --encoder both "${stage_1[@]}" "${EXTRA_1[@]}"
    tuned=(--clip-model-path "$TRAINED/saved_models/$weights.pt")
    results=("$OUT/$dataset/sum.json")
    run src/validate.py --dataset "$dataset" --combining-function sum "${tuned[@]}" "${data[@]}" \
        --metrics-json "${results[0]}"
    for kind in clip4cir moe; do
        # With --seeds, the best weights of each seed are measured as validate.py does, into seed_0.json and so on.
        train "$OUT/$dataset/$kind" combiner_train.py "${tuned[@]}" --combiner-type "$kind" "${stage_2[@]}" \
            --feature-cache "$OUT/features" --seeds "${SEEDS[@]}" "${EXTRA_2[@]}"
        results+=("$TRAINED"/seed_*.json)
    done
    pair=(--combining-function combiner "${tuned[@]}" --combiner-path "$TRAINED/seed_${SEEDS[0]}/saved_models/$combiner.pt")
}
