#!/usr/bin/env bash
# Train a matcher, then evaluate it.
#
#   bash scripts/train/train_cls.sh EXP_NAME PRETRAIN CONFIG EVAL_CONFIG [key=value ...]
#
#   EXP_NAME     name of the experiment: the run is outputs/EXP_NAME/train, its evaluation outputs/EXP_NAME/eval/...
#   PRETRAIN     what to start from: a file of weights, or the name of another experiment
#   CONFIG       released name of the training's settings: copynce.yaml, copynce_lr-2e-4.yaml, copynce_336.yaml,
#                copynce_336_lr-2e-4.yaml, baseline.yaml, finetune.yaml; or a named run (copynce train --list), or a
#                YAML file of settings
#   EVAL_CONFIG  released name of the evaluation's settings, such as dev/isc_copynce-cand.yaml
#   key=value    settings of the training, each an argument (copynce train --help lists them)
#
# NPROC=N starts N processes (default: one for each GPU). DISC21, LISTS, KNN and CANDIDATES say where the data lie: see
# common.sh. The same command continues a run that was stopped.

. "$(dirname "$0")/../common.sh"
need 4 "$@"

case "$3" in
    copynce.yaml) run=matcher ;;
    copynce_lr-2e-4.yaml) run=matcher-stage2 ;;
    copynce_336.yaml) run=matcher-336 ;;
    copynce_336_lr-2e-4.yaml) run=matcher-336-stage2 ;;
    baseline.yaml) run=ablation-matcher-weight-0 ;;
    finetune.yaml) run=matcher-finetune ;;
    *) run="$3" ;;
esac
training_pictures
if [ "$3" = finetune.yaml ]; then known_copies data.labelled_root; fi

copynce train "$run" "${data[@]}" "weights=$(weights_of "$2")" "out=outputs/$1/train" "${@:5}"
bash "$(dirname "$0")/../eval/eval_cls.sh" "$1" "$4"
