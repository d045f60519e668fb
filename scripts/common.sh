# What the scripts under the released names share: models, configs and folders by their released names, and how
# processes are started. Sourced, not run. Settings from the environment:
#   DISC21       folder of the data set (default: datasets/DISC21)
#   LISTS        folder of its id lists and ground truth (default: data if it is there, else DISC21)
#   KNN          mined neighbours for training (default: weights/dino_vits_isc_knn.pth)
#   CANDIDATES   candidate pairs (default: LISTS/isc_copynce_matching_SPLIT_set_pairs.json)
#   NPROC        processes of this machine (default: one for each GPU, or one)

set -euo pipefail

DISC21="${DISC21:-datasets/DISC21}"
if [ -z "${LISTS:-}" ]; then
    if [ -d data ]; then LISTS=data; else LISTS="$DISC21"; fi
fi
NPROC="${NPROC:-$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)}"

# The comment that a script begins with is its help.
if [ "$#" -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
    sed -n '2,/^[^#]*$/s/^# \{0,1\}//p' "$0"
    exit 0
fi

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 2
}

# need COUNT "$@": that many arguments.
need() {
    [ "$#" -gt "$1" ] || fail "expected $1 arguments, got $(($# - 1)); --help tells which"
}

# copynce ARGUMENTS: the command line, in as many processes as NPROC says.
copynce() {
    if [ "$NPROC" -gt 1 ]; then
        torchrun --standalone --nproc_per_node "$NPROC" -m copynce.cli "$@"
    else
        python -m copynce.cli "$@"
    fi
}

# is_file_name MODEL: whether it names a file of weights, and not an experiment.
is_file_name() {
    case "$1" in
        *.tar | *.pth | *.pt | *.safetensors) true ;;
        *) false ;;
    esac
}

# weights_of MODEL: a file of weights or a folder that is there, else the run of experiment MODEL.
weights_of() {
    if is_file_name "$1" || [ -e "$1" ]; then echo "$1"; else echo "outputs/$1/train"; fi
}

# experiment_of MODEL: the name under which outputs/ keeps what is made with it.
experiment_of() {
    local name="$1"
    if is_file_name "$name"; then
        case "$name" in
            outputs/*/*) name="${name#outputs/}" && name="${name%%/*}" ;;
            *) name="$(basename "$name")" && name="${name%%.*}" ;;
        esac
    fi
    echo "$name"
}

# split_of EVAL_CONFIG: its first folder, or its name, tells: dev is dev set II, test is Phase 2.
split_of() {
    case "$1" in
        val/* | *_val*) echo val ;;
        test/* | *_test*) echo test ;;
        *) echo dev ;;
    esac
}

# stem_of CONFIG: dev/vits_lin.yaml -> vits_lin, and test/vits_lin.yaml -> vits_lin_test, as released configs are called.
stem_of() {
    local name split
    name="$(basename "$1")" && name="${name%.yaml}" && split="$(split_of "$1")"
    case "$split,$name" in
        dev,* | *,*_"$split"*) echo "$name" ;;
        *) echo "${name}_$split" ;;
    esac
}

# evaluation_set EVAL_CONFIG: adds the data set and the split to the settings in `data`.
evaluation_set() {
    [ -d "$DISC21/query_images" ] || fail "$DISC21 has no query_images; DISC21=FOLDER says where the data set is"
    data+=("dataset=$DISC21" "split=$(split_of "$1")" "lists=$LISTS")
}

# candidates_of EVAL_CONFIG: the file of candidate pairs.
candidates_of() {
    echo "${CANDIDATES:-$LISTS/isc_copynce_matching_$(split_of "$1")_set_pairs.json}"
}

# ground_truth_of EVAL_CONFIG: which query copies which reference.
ground_truth_of() {
    case "$(split_of "$1")" in
        test) echo "$LISTS/isc_matching_test_set_gt.json" ;;
        *) echo "$LISTS/isc_25k_matching_$(split_of "$1")_set_gt.json" ;;
    esac
}

# training_pictures: adds the released training list, or the folder of training pictures, to the settings in `data`, and
# the mined neighbours, without which the released trainings do not run.
training_pictures() {
    if [ -f "$LISTS/DISC21_train.json" ]; then
        data+=("data.train=$LISTS/DISC21_train.json" "data.root=$DISC21/training_images")
    else
        data+=("data.train=$DISC21/training_images")
    fi
    local knn="${KNN:-weights/dino_vits_isc_knn.pth}"
    [ -f "$knn" ] || fail "$knn: no such file; make it with scripts/run/build_knn.py, or name another with KNN=FILE"
    data+=("data.neighbours=$knn")
}

# pictures DATASET: adds a released list of pictures, or any other, to the arguments in `data`.
pictures() {
    case "$1" in
        isc)
            if [ -f "$LISTS/DISC21_train.json" ]; then
                data+=("$LISTS/DISC21_train.json" "root=$DISC21/training_images")
            else
                data+=("$DISC21/training_images")
            fi
            ;;
        isc_query_*) data+=("$DISC21" "split=${1#isc_query_}" role=query "lists=$LISTS") ;;
        isc_reference) data+=("$DISC21/reference_images") ;;
        *) data+=("$1") ;;
    esac
}

# known_copies ROOT: adds dev set I, whose copies are known, to the settings in `data`; ROOT is the setting of their folder.
known_copies() {
    data+=("data.queries=$LISTS/isc_25k_matching_val_set_query.csv" "data.references=$DISC21/reference_images")
    data+=("data.ground_truth=$LISTS/isc_25k_matching_val_set_gt.json" "$1=$DISC21")
}

data=()
