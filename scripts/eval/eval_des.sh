#!/usr/bin/env bash
# Evaluate a descriptor: uAP, RP90, mAP and recall.
#
#   bash scripts/eval/eval_des.sh MODEL EVAL_CONFIG [key=value ...]
#
#   MODEL        a file of weights, or the name of an experiment (outputs/MODEL/train)
#   EVAL_CONFIG  released name of the settings, such as dev/vits_lin.yaml: its folder tells the split (val is dev set I,
#                dev is dev set II, test is Phase 2), and its name the folder of the results
#   key=value    settings, each an argument (copynce eval --help lists them)
#
# Results and features lie in outputs/EXPERIMENT/eval/CONFIG. NPROC=N starts N processes (default: one for each GPU).
# DISC21 and LISTS say where the data lie: see common.sh.

. "$(dirname "$0")/../common.sh"
need 2 "$@"

evaluation_set "$2"
copynce eval "$(weights_of "$1")" "${data[@]}" "out=outputs/$(experiment_of "$1")/eval/$(stem_of "$2")" "${@:3}"
