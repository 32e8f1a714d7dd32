# shellcheck shell=bash
# How tpu.sh runs commands: it shows them, only shows them under --dry-run, and says the way out where gcloud fails.
# Sourced by it; sets ANSWER.

say() {
  if [[ $DRY_RUN ]]; then printf '# %s\n' "$1"; else printf 'tpu.sh: %s\n' "$1" >&2; fi
}

# The words of a command on one line, as a shell reads them.
quoted() {
  local word line='' tick="'\\''"
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      line+=" $word"
    elif [[ $word =~ ^(--[a-z-]+=)(.*)$ ]]; then
      line+=" ${BASH_REMATCH[1]}'${BASH_REMATCH[2]//\'/$tick}'"
    else
      line+=" '${word//\'/$tick}'"
    fi
  done
  printf '%s' "${line# }"
}

# Run a command that does something; its output comes as it is written. Returns its status, after the way out.
run() {
  if [[ $DRY_RUN ]]; then
    printf '%s\n' "$(quoted "$@")"
    return
  fi
  printf '+ %s\n' "$(quoted "$@")" >&2
  local status=0
  "$@" </dev/null 2>&1 | tee "$WORK/output" || status=$?
  if ((status)); then way_out; fi
  return "$status"
}

# Run a command that answers a question: ANSWER is what it prints, under --dry-run the next of PRETENDED.
ask() {
  if [[ $DRY_RUN ]]; then
    ANSWER=${PRETENDED[0]}
    PRETENDED=("${PRETENDED[@]:1}")
    printf '%s  # %s\n' "$(quoted "$@")" "$ANSWER"
    echo NOT_FOUND >"$WORK/output"
    [[ $ANSWER != NOT_FOUND ]]
    return
  fi
  ANSWER=$("$@" </dev/null 2>"$WORK/output")
}

# Whether the last question failed because there is no such thing.
missing() { grep -qiE 'NOT_FOUND|not found|matched no objects' "$WORK/output"; }

# End after a question that had to be answered.
fail() {
  cat "$WORK/output" >&2
  way_out
  exit 1
}

# With several workers gcloud's scp refuses a key that a running agent lacks, though without an agent it does with the
# file, unless that has a passphrase. The key that gcloud makes where there is none has none.
spare_agent() {
  local key=$HOME/.ssh/google_compute_engine
  if [[ ! -f $key ]] || ssh-keygen -y -P '' -f "$key" >/dev/null 2>&1; then unset SSH_AUTH_SOCK; fi
}

# One line for what gcloud says in the last command's output.
way_out() {
  local hint=
  case $(<"$WORK/output") in
    *"active account"* | *eauthentication* | *invalid_grant* | *UNAUTHENTICATED*) hint="log in: gcloud auth login" ;;
    *SERVICE_DISABLED* | *"has not been used in project"*)
      hint="switch the APIs on: gcloud services enable tpu.googleapis.com compute.googleapis.com --project=$PROJECT" ;;
    *"no more capacity"* | *nsufficient*capacity* | *STOCKOUT* | *"not have enough resources"*)
      hint="no $ACCELERATOR_TYPE is free in ZONE=$ZONE: PROVISIONING=queued or spot waits for one; or another zone" ;;
    *uota* | *RESOURCE_EXHAUSTED*)
      hint="no quota for $PROVISIONING $ACCELERATOR_TYPE in ZONE=$ZONE: a TRC grant names its zones, types and spot or
on-demand; requests that are SUSPENDED or FAILED count until deleted (gcloud compute tpus queued-resources list)" ;;
    *ccelerator*ype* | *ccelerator*onfig*)
      hint="see which types ZONE=$ZONE has: gcloud compute tpus accelerator-types list --zone=$ZONE" ;;
    *untime*ersion*)
      hint="see which there are: gcloud compute tpus tpu-vm versions list --zone=$ZONE" ;;
    *PERMISSION_DENIED* | *"does not have permission"* | *"Permission denied on"*)
      hint="check PROJECT=$PROJECT, ZONE=$ZONE (gcloud compute tpus locations list) and what your account may do" ;;
    *"not present in the SSH agent"*)
      hint="several workers need the key in an agent: eval \"\$(ssh-agent)\"; ssh-add ~/.ssh/google_compute_engine" ;;
    *"worker.sh: No such file"*) hint="the workers are not set up: tpu.sh setup" ;;
    *NOT_FOUND*) hint="there is no slice $RUN in ZONE=$ZONE of PROJECT=$PROJECT: tpu.sh create" ;;
  esac
  if [[ $hint ]]; then say "${hint//$'\n'/ }"; fi
}
