#!/usr/bin/env bash
# Evaluate a matcher on candidate pairs: uAP, RP90, mAP and recall.
#
#   bash scripts/eval/eval_cls.sh MODEL EVAL_CONFIG [key=value ...]
#
#   MODEL        a file of weights, or the name of an experiment (outputs/MODEL/train)
#   EVAL_CONFIG  released name of the settings, such as dev/isc_copynce-cand.yaml: its folder tells the split (val is dev
#                set I, dev is dev set II, test is Phase 2), and its name the folder of the results
#   key=value    settings, each an argument (copynce match --help lists them)
#
# Results lie in outputs/EXPERIMENT/eval/CONFIG. NPROC=N starts N processes (default: one for each GPU). DISC21, LISTS and
# CANDIDATES say where the data lie: see common.sh.

. "$(dirname "$0")/../common.sh"
need 2 "$@"

evaluation_set "$2"
out="outputs/$(experiment_of "$1")/eval/$(stem_of "$2")"
copynce match "$(weights_of "$1")" "$(candidates_of "$2")" "${data[@]}" "out=$out" "${@:3}"
NPROC=1 copynce measure "$out/predictions.csv" "$(ground_truth_of "$2")" "out=$out"
