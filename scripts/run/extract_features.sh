#!/usr/bin/env bash
# Descriptors of one of the released code's lists of pictures.
#
#   bash scripts/run/extract_features.sh MODEL DATASET CONFIG OUTPUT_NAME [key=value ...]
#
#   MODEL        a file of weights, or the name of an experiment (outputs/MODEL/train)
#   DATASET      isc (the training pictures), isc_query_val, isc_query_dev, isc_query_test, isc_reference; or any CSV
#                (uuid,path), folder or shards
#   CONFIG       released name of settings, such as dev/vits_lin.yaml: names the folder of the results
#   OUTPUT_NAME  the features are the folder outputs/EXPERIMENT/eval/CONFIG/OUTPUT_NAME
#   key=value    settings, each an argument (copynce extract --help lists them)
#
# NPROC=N starts N processes (default: one for each GPU). DISC21 and LISTS say where the data lie: see common.sh.

. "$(dirname "$0")/../common.sh"
need 4 "$@"

pictures "$2"
out="outputs/$(experiment_of "$1")/eval/$(stem_of "$3")/$4"
copynce extract "$(weights_of "$1")" "${data[@]}" --out "$out" "${@:5}"
