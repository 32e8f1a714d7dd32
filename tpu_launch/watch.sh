# shellcheck shell=bash
# How tpu.sh brings a run back until it is done. Sourced by it.

RETRIES=10 # attempts in a row before watch gives up
RESUME='' # whether to go on, once, with a run that was stopped or failed
SAID='' SEEN='' HELD='' FAILED=0

rest() { # WHY; said once
  if [[ $1 != "$SAID" ]]; then say "$1; looking again every $POLL_SECONDS s"; fi
  SAID=$1
  if [[ ! $DRY_RUN ]]; then sleep "$POLL_SECONDS"; fi
}

look() { slice_state || { cat "$WORK/output" >&2 && way_out && return 1; }; }

# Until the slice is there, or will not be; a queue may take days, and the network of a laptop does not last as long.
wait_for_slice() {
  until look && [[ $STATE != waiting ]]; do rest "$RUN is ${ANSWER:-not to be seen}"; done
}

# One look, and what follows from it. Fails where a deed does, or the first look; OVER when the run is done.
watch_once() {
  if ! look; then
    [[ $SEEN ]] || return
    rest "$RUN is not to be seen" # for as long as it takes: a network comes back, a login is renewed
    return
  fi
  local before=$STATE seen=$ANSWER
  SEEN=1
  case $before in
    waiting)
      if [[ $seen != DELETING ]]; then HELD=1; fi # else it may be our own deletion, which was not seen through
      rest "$RUN is $seen"
      ;;
    ready)
      HELD=1 FAILED=0
      watch_run
      ;;
    halted) die "$RUN is $seen by someone's hand: gcloud compute tpus tpu-vm start $RUN" 1 ;;
    *) # preempted, failed, absent
      if exported; then
        OVER=1
        return
      fi
      [[ ! $HELD || $before != absent ]] || die "someone deleted $RUN; tpu.sh up goes on from the last save" 75
      if [[ $before == failed ]]; then
        ((FAILED += 1))
        ((FAILED < RETRIES)) || die "$RUN FAILED again; gcloud compute tpus queued-resources describe $RUN tells why" 1
        rest "$RUN is $seen"
      fi
      say "$RUN is $seen: the run goes on from its last save on a new slice"
      HELD=
      [[ $before == absent ]] || delete_slice || return
      create_slice
      ;;
  esac
}

watch_run() {
  if ! run_state; then
    cat "$WORK/output" >&2
    say "the workers do not answer: they boot, or the slice is being taken"
    return 1
  fi
  if [[ $RUN_STATE == absent || ($RESUME && ! $RUN_STATE =~ running|done) ]]; then
    setup && launch && RESUME=
    return
  fi
  case $RUN_STATE in
    done) OVER=1 ;;
    running)
      RESUME=
      rest "the run is going"
      ;;
    stopped) die "the run was stopped by tpu.sh stop; tpu.sh up or launch resumes it" 75 ;;
    *)
      on_workers run all 'sudo journalctl --unit=easyrm --no-pager --lines=15' || true
      halt || true
      [[ $RUN_STATE != 2 ]] ||
        die "the run ended with status 2: a line above says what to mend, then tpu.sh up; the slice is still held" 2
      die "the run ended with status $RUN_STATE as often as its unit allows; tpu.sh up tries again; the slice is \
still held" 1
      ;;
  esac
}

# Until the run is done. Ends with 2 after bad input, 75 after tpu.sh stop, 1 after what cannot be helped.
watch() {
  local left=$RETRIES
  OVER=
  until [[ $OVER ]]; do
    if watch_once; then
      left=$RETRIES
    else
      ((left -= 1)) || die "$RETRIES attempts in a row failed, see above; $HINT" 1
      rest "an attempt failed"
    fi
  done
  say "the run is done: $BUCKET/$RUN"
}
