#!/usr/bin/env bash
# Features of a pretrained backbone, for mining neighbours: the class token after its final norm (PROTOCOLS 5).
#
#   bash scripts/run/extract_dino_features.sh DATASET CONFIG OUTPUT_NAME [key=value ...]
#
#   DATASET      as of extract_features.sh: isc, isc_query_val, isc_reference, ..., or a CSV, folder or shards
#   CONFIG       not used here; the released script takes it
#   OUTPUT_NAME  the features are the folder outputs/dino/eval/OUTPUT_NAME
#   key=value    settings, each an argument (copynce extract --help lists them)
#
# DINO=FILE names the backbone (default: weights/dino_deitsmall16_pretrain.pth). NPROC, DISC21 and LISTS: see common.sh.

. "$(dirname "$0")/../common.sh"
need 3 "$@"

DINO="${DINO:-weights/dino_deitsmall16_pretrain.pth}"
[ -f "$DINO" ] || fail "$DINO: no such file; DINO=FILE names the backbone's weights"
model="outputs/dino/$(sha256sum < "$DINO" | cut -c 1-16).safetensors"  # by content: another backbone is another model
if [ ! -f "$model" ]; then
    mkdir -p outputs/dino
    NPROC=1 copynce convert "$DINO" "$model" --as descriptor head=cls norm_eps=1e-4
fi
pictures "$1"
copynce extract "$model" "${data[@]}" --out "outputs/dino/eval/$3" "${@:4}"
