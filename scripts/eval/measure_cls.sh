#!/usr/bin/env bash
# Measure scores in a file: uAP, RP90, mAP and recall.
#
#   bash scripts/eval/measure_cls.sh RESULT_FILE EVAL_CONFIG [key=value ...]
#
#   RESULT_FILE  scores as JSON or CSV
#   EVAL_CONFIG  released name of the settings, such as dev/vits_lin.yaml: its folder tells the split
#   key=value    settings, each an argument (copynce measure --help lists them)

. "$(dirname "$0")/../common.sh"
need 2 "$@"

NPROC=1 copynce measure "$1" "$(ground_truth_of "$2")" "${@:3}"
