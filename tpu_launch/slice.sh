# shellcheck shell=bash
# The slice and the run on it: what they are at this moment, and what makes and removes a slice. Sourced by tpu.sh.
# shellcheck disable=SC2034 # STATE and RUN_STATE are for others

UNIT_STATE='systemctl show easyrm -p LoadState,ActiveState,UnitFileState,ExecMainCode,ExecMainStatus | sort | xargs'

tpus() { ask gcloud compute tpus "$@" || { missing && ANSWER=ABSENT; }; }

on_workers() { # HOW WHICH COMMAND; how: run or ask
  "$1" gcloud compute tpus tpu-vm ssh "$RUN" --worker="$2" \
    --ssh-flag='-oServerAliveInterval=15 -oConnectTimeout=15' --command="$3"
}

# STATE: absent, waiting, ready, preempted, failed or halted; ANSWER: in the words of Google's API. Fails where gcloud
# does. https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources and .nodes
slice_state() {
  if [[ $PROVISIONING != on-demand ]]; then
    tpus queued-resources describe "$RUN" --format='value(state.state)' || return
    case $ANSWER in
      ABSENT) STATE=absent ;;
      SUSPENDED) STATE=preempted ;;
      FAILED) STATE=failed ;;
      *) STATE=waiting ;; # CREATING, ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING
    esac
    [[ $ANSWER == ACTIVE ]] || return 0
  fi
  tpus tpu-vm describe "$RUN" --format='value(state)' || return
  case $ANSWER in
    ABSENT) if [[ $PROVISIONING == on-demand ]]; then STATE=absent; else STATE=waiting; fi ;;
    READY) STATE=ready ;;
    PREEMPTED | TERMINATED | UNKNOWN) STATE=preempted ;; # UNKNOWN: after a repair that failed
    STOPPED | STOPPING | HIDDEN | HIDING) STATE=halted ;;
    *) STATE=waiting ;; # CREATING, STARTING, RESTARTING, REIMAGING, REPAIRING, UNHIDING, DELETING
  esac
}

# RUN_STATE of all workers together: done, running, stopped, absent, or the exit status with which one of them failed.
run_state() {
  local line words='' word
  on_workers ask all "$UNIT_STATE" && [[ $ANSWER ]] || return
  while read -r line; do
    case $line in
      *LoadState=not-found*) words+=' absent' ;;
      *ActiveState=active* | *ActiveState=*ing*) words+=' running' ;;
      *=inactive*ExecMainCode=1\ ExecMainStatus=0\ *) words+=' done' ;;
      *=inactive*UnitFileState=disabled*) words+=' stopped' ;;
      *=inactive*ExecMainCode=0\ *) words+=' running' ;; # enabled and not yet started: the worker boots
      *ExecMainStatus=*) line=${line##*ExecMainStatus=} && words+=" ${line%% *}" ;; # failed, or ended by a signal
    esac
  done <<<"$ANSWER"
  [[ $words ]] || return
  RUN_STATE='done'
  for word in running stopped absent 69; do
    if [[ "$words " == *" $word "* ]]; then RUN_STATE=$word; fi
  done
  words=${words// 69/} # the status of those that lost another one
  if [[ $words =~ [0-9]+ ]]; then RUN_STATE=${BASH_REMATCH[0]}; fi
  if [[ "$words " == *" 2 "* ]]; then RUN_STATE=2; fi
}

exported() { ask gcloud storage ls "$BUCKET/$RUN/export/config.json"; } # which an export writes last

delete_slice() {
  if [[ $PROVISIONING == on-demand ]]; then
    run gcloud compute tpus tpu-vm delete "$RUN"
  else
    run gcloud compute tpus queued-resources delete "$RUN" --force
  fi
}

create_slice() {
  local flags
  read -ra flags <<<"$CREATE_FLAGS"
  if [[ $PROVISIONING == spot ]]; then flags=(--spot ${flags[@]+"${flags[@]}"}); fi
  if [[ $PROVISIONING == on-demand ]]; then
    run gcloud compute tpus tpu-vm create "$RUN" --accelerator-type="$ACCELERATOR_TYPE" \
      --version="$RUNTIME_VERSION" ${flags[@]+"${flags[@]}"}
  else
    run gcloud compute tpus queued-resources create "$RUN" --node-id="$RUN" \
      --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" ${flags[@]+"${flags[@]}"}
  fi
}

halt() { on_workers run all 'sudo systemctl disable --now easyrm'; } # a stopped run does not start at the next boot
