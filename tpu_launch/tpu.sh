#!/usr/bin/env bash
# From a laptop to a trained reward model on a TPU slice, and back; README.md beside it tells more.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$HERE/settings.sh"
. "$HERE/gcloud.sh"
. "$HERE/slice.sh"
. "$HERE/watch.sh"

USAGE="tpu.sh [--settings=FILE] [--dry-run] COMMAND
  up      the whole life: create, set up, launch, watch, delete if DELETE_WHEN_DONE, export
  create  request the slice and wait for it     setup   code of HEAD and its environment on every worker
  doctor  check every worker before the run     launch  start the run on every worker
  logs    follow worker 0                       status  the slice, the run on each worker, the last line
  watch   bring the run back until it is done   stop    save and end; the slice stays
  export  fetch the exported model              delete  give the slice back
Settings: tpu_launch/settings.env; --dry-run prints every command and runs none."
WORKER='bash easyrm/code/tpu_launch/worker.sh'

# Sees to it that the slice is asked for; STATE is what it was before.
request() {
  local name=${BUCKET#gs://} region=${ZONE%-*}
  name=${name%%/*}
  if ask gcloud storage buckets describe "gs://$name" --format='value(location)'; then
    [[ $(tr "[:upper:]" "[:lower:]" <<<"$ANSWER") == "$region" ]] ||
      say "BUCKET=$BUCKET is in $ANSWER, the slice in $region: what passes between them is slow and may be charged"
  elif missing; then # who is not allowed this question may be allowed what a run needs
    die "BUCKET=$BUCKET does not exist: gcloud storage buckets create gs://$name --location=$region"
  fi
  slice_state || fail
  case $STATE in
    absent) create_slice || exit 1 ;;
    preempted | failed)
      say "$RUN is $ANSWER: it is deleted and created again"
      delete_slice && create_slice || exit 1
      ;;
    *) say "$RUN exists already, in state $ANSWER" ;;
  esac
}

create() {
  request
  if [[ $STATE != ready ]]; then wait_for_slice; fi
  [[ $STATE == ready ]] || die "$RUN is $ANSWER; gcloud compute tpus queued-resources describe $RUN tells why" 1
}

# COMMIT: HEAD as it is now, for this command and whatever it does later.
pin_commit() {
  COMMIT=$(git rev-parse --short=12 HEAD 2>/dev/null) || COMMIT=
  if [[ $DRY_RUN ]]; then
    COMMIT=${COMMIT:-HEAD}
    return
  fi
  [[ $COMMIT ]] || die "$PWD is no git checkout: the workers get the code of HEAD"
  local changed
  changed=$(git diff --name-only HEAD -- . ':!tpu_launch/settings.env' &&
    git ls-files --others --exclude-standard -- easyrm) # elsewhere they may be settings
  [[ -z $changed ]] ||
    die "the workers get the code of HEAD, and these files differ from it: ${changed//$'\n'/, }; commit them"
}

setup() {
  local archive=easyrm-$COMMIT.tar.gz secrets=''
  if [[ $HF_TOKEN_FILE ]]; then secrets+=' .cache/huggingface/token'; fi
  if [[ $NETRC_FILE ]]; then secrets+=' .netrc'; fi
  run mkdir -p build &&
    run git archive --format=tar.gz --output="build/$archive" "$COMMIT" &&
    run gcloud compute tpus tpu-vm scp "build/$archive" "$RUN:" --worker=all &&
    on_workers run all "rm -rf easyrm/next && mkdir -p easyrm/next && tar -xzf $archive -C easyrm/next && bash \
easyrm/next/tpu_launch/worker.sh setup $COMMIT $EXTRAS$secrets && rm $archive" || return
  if [[ $HF_TOKEN_FILE ]]; then
    run gcloud compute tpus tpu-vm scp "$HF_TOKEN_FILE" "$RUN:.cache/huggingface/token" --worker=all || return
  fi
  if [[ $NETRC_FILE ]]; then run gcloud compute tpus tpu-vm scp "$NETRC_FILE" "$RUN:.netrc" --worker=all; fi
}

doctor() { on_workers run all "$WORKER doctor $(quoted "${FLAGS[@]}")"; }

launch() { on_workers run all "$WORKER launch $(quoted "${FLAGS[@]}")"; }

logs() { on_workers run 0 'sudo journalctl --unit=easyrm --follow --lines=50 --output=cat'; }

stop() {
  slice_state || fail
  if [[ $STATE != ready ]]; then
    say "nothing runs: $RUN is $ANSWER"
    return
  fi
  run_state || fail
  if [[ $RUN_STATE == absent ]]; then say "nothing runs: no run was launched on $RUN"; else halt; fi
}

status() {
  slice_state || fail
  say "$RUN ($ACCELERATOR_TYPE, $PROVISIONING, $ZONE) is $ANSWER"
  if [[ $STATE != ready ]]; then return; fi
  run_state || fail
  case $RUN_STATE in
    [0-9]*) say "the run failed with status $RUN_STATE" ;;
    absent) say "no run was launched" ;;
    *) say "the run is $RUN_STATE" ;;
  esac
  on_workers run 0 'sudo journalctl --unit=easyrm --no-pager --lines=5 --output=cat'
}

fetch() {
  if [[ ! $EXPORT_TO ]]; then
    say "the model stays in $BUCKET/$RUN/export (EXPORT_TO is empty)"
    return
  fi
  run mkdir -p "$EXPORT_TO/$RUN/export"
  run gcloud storage rsync --recursive "$BUCKET/$RUN/export" "$EXPORT_TO/$RUN/export"
}

export_model() {
  if ! exported; then
    missing || fail
    die "$BUCKET/$RUN/export holds no whole model yet; tpu.sh status tells how far the run is" 1
  fi
  fetch
}

# However it was requested: PROVISIONING may be another since.
delete() {
  for PROVISIONING in queued on-demand; do
    slice_state || fail
    if [[ $STATE != absent ]]; then
      delete_slice
      return
    fi
  done
  say "there is no slice $RUN in $ZONE"
}

up() {
  if exported; then
    say "the run is done already"
  else
    request
    RESUME=1 SEEN=1
    watch
  fi
  if [[ $DELETE_WHEN_DONE == true ]]; then
    until (delete); do rest "$RUN is still held"; done # first: the model is in the bucket, and an idle slice costs
  else
    say "$RUN is still held (DELETE_WHEN_DONE=false): tpu.sh delete gives it back"
  fi
  fetch
}

# What --dry-run takes for granted: the slice comes at once, and watch sees one preemption.
pretend() { # COMMAND
  local slice=(ACTIVE READY) gone=SUSPENDED back held=(ACTIVE READY)
  local new='ActiveState=inactive ExecMainCode=0 ExecMainStatus=0 LoadState=not-found UnitFileState='
  local going='ActiveState=active ExecMainCode=0 ExecMainStatus=0 LoadState=loaded UnitFileState=enabled'
  local over='ActiveState=inactive ExecMainCode=1 ExecMainStatus=0 LoadState=loaded UnitFileState=enabled'
  if [[ $PROVISIONING == on-demand ]]; then slice=(READY) gone=PREEMPTED held=(NOT_FOUND READY); fi
  back=("$gone" NOT_FOUND "${slice[@]}" "$new" "${slice[@]}" "$over")
  case $1 in
    create) PRETENDED=("${ZONE%-*}" NOT_FOUND "${slice[@]}") ;;
    watch) PRETENDED=("${slice[@]}" "$going" "${back[@]}") ;;
    up)
      PRETENDED=(NOT_FOUND "${ZONE%-*}" NOT_FOUND "${slice[@]}" "$new" "${slice[@]}" "$going")
      PRETENDED+=("${back[@]}" "${held[@]}")
      ;;
    delete) PRETENDED=("${held[@]}") ;;
    export_model) PRETENDED=("$BUCKET/$RUN/export/config.json") ;;
    *) PRETENDED=("${slice[@]}" "$going") ;;
  esac
}

settings=$HERE/settings.env DRY_RUN='' command=''
for word in "$@"; do
  case $word in
    --settings=*) settings=${word#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    -h | --help) command=help ;;
    -*) die "unknown flag $word; $USAGE" ;;
    *) [[ ! $command ]] || die "two commands, $command and $word: give one"; command=$word ;;
  esac
done
case $command in
  up | create | setup | doctor | launch | logs | status | watch | stop | delete) ;;
  export) command=export_model ;;
  help) echo "$USAGE" && exit ;;
  *) die "${command:+unknown command $command; }$USAGE" ;;
esac
read_settings "$settings"
cd "$HERE/.."
check_settings "$settings"
run_flags
[[ $DRY_RUN ]] || command -v gcloud >/dev/null ||
  die "gcloud is not on PATH: install it (https://cloud.google.com/sdk/docs/install), then gcloud auth login" 1
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
HINT="$RUN is as it was: tpu.sh up goes on, tpu.sh delete gives it back"
case $command in create | watch | up) trap 'say "$HINT"; exit 130' INT TERM ;; esac
case $command in setup | watch | up) pin_commit ;; esac
spare_agent
pretend "$command"
say "$RUN: $ACCELERATOR_TYPE ($PROVISIONING) in $ZONE of $PROJECT, run in $BUCKET/$RUN"
# So every command below is as short as when typed.
export CLOUDSDK_CORE_PROJECT=$PROJECT CLOUDSDK_COMPUTE_ZONE=$ZONE CLOUDSDK_CORE_DISABLE_PROMPTS=1
if [[ $DRY_RUN ]]; then
  quoted export CLOUDSDK_CORE_PROJECT="$PROJECT" CLOUDSDK_COMPUTE_ZONE="$ZONE" CLOUDSDK_CORE_DISABLE_PROMPTS=1 && echo
fi
"$command"
