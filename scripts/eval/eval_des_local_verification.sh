#!/usr/bin/env bash
# Candidate pairs for a matcher: the local crops of a descriptor.
#
#   bash scripts/eval/eval_des_local_verification.sh MODEL EVAL_CONFIG [MODE] [key=value ...]
#
#   MODEL        a file of weights, or the name of an experiment (outputs/MODEL/train)
#   EVAL_CONFIG  released name of the settings, such as dev/vits_lin_loc-ver.yaml: its folder tells the split, and its name
#                the folder of the results
#   MODE         M:N (default): a group's best over all of its views; 1:N: the best of each view
#   key=value    settings, each an argument (copynce candidates --help lists them)
#
# Results lie in outputs/EXPERIMENT/eval/CONFIG. NPROC=N starts N processes (default: one for each GPU). DISC21 and LISTS
# say where the data lie: see common.sh.

. "$(dirname "$0")/../common.sh"
need 2 "$@"

evaluation_set "$2"
out="outputs/$(experiment_of "$1")/eval/$(stem_of "$2")"
case "${3:-}" in
    "" | *=*) mode=M:N && settings=("${@:3}") ;;
    *) mode="$3" && settings=("${@:4}") ;;
esac
copynce candidates "$(weights_of "$1")" "${data[@]}" "mode=$mode" "out=$out" "${settings[@]}"
