#!/usr/bin/env bash
# Train a descriptor, then evaluate it.
#
#   bash scripts/train/train_des.sh EXP_NAME PRETRAIN CONFIG EVAL_CONFIG [key=value ...]
#
#   EXP_NAME     name of the experiment: the run is outputs/EXP_NAME/train, its evaluation outputs/EXP_NAME/eval/...
#   PRETRAIN     what to start from: a file of weights, or the name of another experiment
#   CONFIG       released name of the training's settings: copynce.yaml, copynce_vitb.yaml, baseline.yaml,
#                finetune.yaml, finetune_vitb.yaml; or a named run (copynce train --list), or a YAML file of settings
#   EVAL_CONFIG  released name of the evaluation's settings, such as dev/vits_lin.yaml
#   key=value    settings of the training, each an argument (copynce train --help lists them)
#
# NPROC=N starts N processes (default: one for each GPU). DISC21, LISTS and KNN say where the data lie: see common.sh.
# The same command continues a run that was stopped.

. "$(dirname "$0")/../common.sh"
need 4 "$@"

case "$3" in
    copynce.yaml) run=descriptor ;;
    copynce_vitb.yaml) run=descriptor-vitb ;;
    baseline.yaml) run=ablation-weight-0 ;;
    finetune.yaml) run=descriptor-finetune ;;
    finetune_vitb.yaml) run=descriptor-finetune && data+=(model.backbone=vit_base_patch16_224) ;;
    *) run="$3" ;;
esac
case "$3" in
    finetune*.yaml) known_copies data.root ;;
    *) training_pictures ;;
esac

copynce train "$run" "${data[@]}" "weights=$(weights_of "$2")" "out=outputs/$1/train" "${@:5}"
bash "$(dirname "$0")/../eval/eval_des.sh" "$1" "$4"
