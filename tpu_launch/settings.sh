# shellcheck shell=bash
# Reads and checks the settings of tpu.sh; sourced by it. Sets FLAGS, what train_rm is started with, and EXTRAS, what
# is installed for them.
# shellcheck disable=SC2034,SC2153 # the settings come from a file, and some are for others

KEYS="PROJECT ZONE ACCELERATOR_TYPE RUNTIME_VERSION PROVISIONING CREATE_FLAGS BUCKET RUN RECIPE TRAIN_FLAGS
HF_TOKEN_FILE NETRC_FILE POLL_SECONDS EXPORT_TO DELETE_WHEN_DONE"

die() { # MESSAGE [STATUS]
  printf 'tpu.sh: %s\n' "$1" >&2
  exit "${2-2}"
}

read_settings() { # FILE; what the environment sets wins, also in the lines that refer to it
  local key line given=' ' lines=''
  [[ -f $1 ]] || die "--settings=$1: no such file; copy tpu_launch/settings.env"
  for key in $KEYS; do
    if [[ -n ${!key+set} ]]; then given+="$key "; fi
  done
  while IFS= read -r line || [[ $line ]]; do
    [[ $given == *" ${line%%=*} "* ]] || lines+=$line$'\n'
  done <"$1"
  eval "$lines"
  for key in $KEYS; do
    if [[ -z ${!key+set} ]]; then printf -v "$key" '%s' ''; fi
  done
}

check_settings() { # FILE
  local key
  for key in PROJECT ZONE ACCELERATOR_TYPE PROVISIONING BUCKET RUN POLL_SECONDS; do
    [[ -n ${!key} ]] || die "$key is empty: set it in $1"
  done
  for key in PROJECT BUCKET; do
    if [[ ! $DRY_RUN && ${!key} =~ ^(gs://)?your-(project|bucket)$ ]]; then
      die "$key=${!key} is a placeholder: set your own in $1, or as a variable of the environment"
    fi
  done
  [[ $BUCKET == gs://?* && $BUCKET != */ ]] || die "BUCKET=$BUCKET: give gs://NAME, without a slash at the end"
  for key in TRAIN_FLAGS CREATE_FLAGS; do
    [[ ${!key} != *$'\n'* ]] || die "$key has several lines, beginning with ${!key%%$'\n'*}: give one"
  done
  [[ $RUN =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    die "RUN=$RUN also names the slice: lower-case letters, digits and hyphens, at most 63, beginning with a letter"
  [[ $POLL_SECONDS =~ ^[0-9]+$ ]] || die "POLL_SECONDS=$POLL_SECONDS: give whole seconds"
  case $PROVISIONING in
    spot | queued | on-demand) ;;
    *) die "PROVISIONING=$PROVISIONING: choose spot, queued or on-demand" ;;
  esac
  case $DELETE_WHEN_DONE in
    true | false) ;;
    *) die "DELETE_WHEN_DONE=$DELETE_WHEN_DONE: choose true or false" ;;
  esac
  [[ $RECIPE || $TRAIN_FLAGS ]] || die "RECIPE and TRAIN_FLAGS are empty: there is nothing to train"
  for key in HF_TOKEN_FILE NETRC_FILE; do
    if [[ ! $DRY_RUN && ${!key} && ! -f ${!key} ]]; then
      die "$key=${!key}: no such file; write it (hf auth login, wandb login) or leave $key empty"
    fi
  done
  RUNTIME_VERSION=${RUNTIME_VERSION:-$(runtime_of "$ACCELERATOR_TYPE")}
  [[ $RUNTIME_VERSION ]] ||
    die "ACCELERATOR_TYPE=$ACCELERATOR_TYPE: not v4-N, v5litepod-N, v5p-N or v6e-N; for others set RUNTIME_VERSION"
}

# https://cloud.google.com/tpu/docs/runtimes, "PyTorch and JAX"
runtime_of() {
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
  esac
}

# Hosts that do not find each other fail, and never train apart into one bucket. They may start minutes apart: one
# installs longer, one comes back from maintenance.
run_flags() {
  local words
  read -ra words <<<"$TRAIN_FLAGS"
  FLAGS=(--output_dir="$BUCKET/$RUN" --export=true --distributed=true --distributed_timeout=1800)
  FLAGS+=(${words[@]+"${words[@]}"})
  if [[ $RECIPE ]]; then FLAGS=(--recipe="$RECIPE" "${FLAGS[@]}"); fi
  EXTRAS=tpu,gcs
  if [[ $TRAIN_FLAGS == *--wandb_project=* ]]; then EXTRAS+=,wandb; fi
  if [[ $TRAIN_FLAGS == *--tensorboard* ]]; then EXTRAS+=,tensorboard; fi
}
