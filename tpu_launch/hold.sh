#!/usr/bin/env bash
# hold.sh COMMAND...: runs COMMAND, passes SIGTERM on, and exits with its status, with 69 not before HOLD seconds.
# Of several hosts the one that fails ends last, after the others could read why. What judges a run by the first status
# that it sees would otherwise see the 69 of the others ("a process was lost, run again") and never the reason.
set -u

HOLD=20

ulimit -l unlimited 2>/dev/null # libtpu locks the memory that it shares with the chips; where root may, as in GKE

child='' stopped=''
trap 'stopped=true; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM
"$@" &
child=$!
[[ -z $stopped ]] || kill -TERM "$child" # it came before there was a child
while
  stopped=''
  wait "$child"
  status=$?
  [[ -n $stopped ]] # the signal ended `wait`, not the command
do :; done
if [[ $status == 69 ]]; then
  sleep "$HOLD" &
  [[ -n $stopped ]] || wait $! # a second SIGTERM ends the wait
fi
exit "$status"
