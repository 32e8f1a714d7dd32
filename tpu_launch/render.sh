#!/usr/bin/env bash
# Prints a manifest with the settings put in: tpu_launch/render.sh [--settings=FILE] tpu_launch/gke/jobset.yaml
# What a manifest needs beyond settings.env follows from ACCELERATOR_TYPE and PROVISIONING, below.
# shellcheck disable=SC2034 # the manifests use them
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/settings.sh"

die() {
  printf 'render.sh: %s\n' "$1" >&2
  exit 2
}

settings=$HERE/settings.env
if [[ ${1-} == --settings=* ]]; then
  settings=${1#*=}
  shift
fi
[[ $# == 1 && -f $1 ]] || die "name one manifest, as in: render.sh tpu_launch/gke/jobset.yaml"
command -v envsubst >/dev/null || die "envsubst is not on PATH: Debian and Homebrew have it in gettext"
KEYS+=" IMAGE"
DRY_RUN=
read_settings "$settings"
check_settings "$settings"
run_flags

size=${ACCELERATOR_TYPE##*-}
[[ $size =~ ^[1-9][0-9]{0,3}$ ]] || die "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: end it with a size, as in v5p-64"
case $ACCELERATOR_TYPE in # the size of v4 and v5p counts cores, two a chip
  v4-*) GKE_ACCELERATOR=tpu-v4-podslice SLICE_CHIPS=$((size / 2)) ;;
  v5p-*) GKE_ACCELERATOR=tpu-v5p-slice SLICE_CHIPS=$((size / 2)) ;;
  v5litepod-*) GKE_ACCELERATOR=tpu-v5-lite-podslice SLICE_CHIPS=$size ;;
  v6e-*) GKE_ACCELERATOR=tpu-v6e-slice SLICE_CHIPS=$size ;;
  *) die "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: give v4-N, v5litepod-N, v5p-N or v6e-N" ;;
esac
case ${ACCELERATOR_TYPE%%-*}:$SLICE_CHIPS in
  v4:8 | v5p:8) TOPOLOGY=2x2x2 ;;
  v4:16 | v5p:16) TOPOLOGY=2x2x4 ;;
  v4:32 | v5p:32) TOPOLOGY=2x4x4 ;;
  v4:64 | v5p:64) TOPOLOGY=4x4x4 ;;
  v4:128 | v5p:128) TOPOLOGY=4x4x8 ;;
  v4:256 | v5p:256) TOPOLOGY=4x8x8 ;;
  v5litepod:8 | v6e:8) TOPOLOGY=2x4 ;;
  v5litepod:16 | v6e:16) TOPOLOGY=4x4 ;;
  v5litepod:32 | v6e:32) TOPOLOGY=4x8 ;;
  v5litepod:64 | v6e:64) TOPOLOGY=8x8 ;;
  v5litepod:128 | v6e:128) TOPOLOGY=8x16 ;;
  v5litepod:256 | v6e:256) TOPOLOGY=16x16 ;;
  *) die "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: manifests are for 8, 16, 32, 64, 128 or 256 chips, tpu.sh for any" ;;
esac
CHIPS_PER_HOST=4 HOSTS=$((SLICE_CHIPS / 4))

USE_SPOT=false SPOT_OPERATOR=DoesNotExist
if [[ $PROVISIONING == spot ]]; then USE_SPOT=true SPOT_OPERATOR=Exists; fi
[[ $PROVISIONING != queued || $1 != *sky.yaml ]] ||
  die "PROVISIONING=queued: SkyPilot leaves requests behind that bill when they are met; give spot or on-demand"
((${#RUN} <= 40)) || die "RUN=$RUN: give at most 40 characters, for the names of the pods are made from it"

names=$(envsubst --variables "$(<"$1")" | sort -u)
for name in $names; do
  [[ ${!name+set} ]] || die "$1 names $name, which is not a setting"
  [[ ${!name} != *your-* ]] || die "$name=${!name} is a placeholder: set your own in $settings"
  # shellcheck disable=SC2163 # the variable that it names
  export "$name"
done
exec envsubst <"$1"
