#!/usr/bin/env bash
# What tpu.sh runs on each worker:
#   worker.sh setup COMMIT EXTRAS [SECRET...]   the code in ~/easyrm/next becomes ~/easyrm/code, with its environment
#   worker.sh doctor FLAG...                    python -m easyrm.doctor
#   worker.sh launch FLAG...                    a systemd unit that runs python -m easyrm.train_rm
set -euo pipefail

UV=0.13.9 # brings Python 3.11: the images of TPU VMs are Ubuntu 22.04 with 3.10
ROOT=$HOME/easyrm
UNIT=/etc/systemd/system/easyrm.service

die() {
  printf '%s: %s\n' "$(hostname)" "$1" >&2
  exit 2
}

active() {
  case $(systemctl show easyrm --property=ActiveState) in
    *=active | *=activating | *=deactivating | *=reloading) return 0 ;;
  esac
  return 1
}

# Files for secrets exist with mode 600 before anything is copied into them.
make_private() {
  local file
  for file in "$@"; do
    [[ -e $HOME/$file ]] || install -D -m 600 /dev/null "$HOME/$file"
    chmod 600 "$HOME/$file"
  done
}

setup() {
  local commit=$1 extras=$2
  shift 2
  cd "$ROOT"
  make_private "$@"
  if [[ $(cat installed 2>/dev/null) == "$commit $extras" ]]; then
    rm -rf next
    echo "$(hostname): already set up ($commit)"
    return
  fi
  ! active || die "a run is going with other code ($(cat installed)); tpu.sh stop ends it in good order"
  rm -rf installed code
  mv next code
  if [[ $(bin/uv --version 2>/dev/null) != "uv $UV"* ]]; then
    curl -LsSf "https://astral.sh/uv/$UV/install.sh" | UV_UNMANAGED_INSTALL=$ROOT/bin sh
  fi
  bin/uv venv --quiet --allow-existing --python 3.11 venv
  # Editable, because uv would take a copy of the same version that it built before for this one.
  (cd code && ../bin/uv pip install --quiet --python ../venv --constraint constraints.txt --editable ".[$extras]")
  echo "$commit $extras" >installed
  echo "$(hostname): set up ($commit)"
}

doctor() {
  ! active || die "a run holds the TPU; tpu.sh stop ends it in good order"
  cd "$ROOT/code"
  exec ../venv/bin/python -m easyrm.doctor "$@"
}

# A word as systemd reads it in ExecStart: no specifiers (%), no variables ($), quotes where they are needed.
unit_word() {
  local word=$1
  word=${word//\\/\\\\}
  word=${word//\"/\\\"}
  word=${word//%/%%}
  word=${word//\$/\$\$}
  if [[ $word =~ [^A-Za-z0-9_@%+=:,./-] ]]; then word="\"$word\""; fi
  printf '%s' "$word"
}

launch() {
  local unit flag flags=
  for flag in "$@"; do flags+=" $(unit_word "$flag")"; done
  unit=$(<"$ROOT/code/tpu_launch/easyrm.service")
  unit=${unit//@USER@/"$(id -un)"}
  unit=${unit//@HOME@/"$HOME"}
  unit=${unit//@FLAGS@/"${flags# }"}
  if active; then
    [[ $(sudo cat "$UNIT") == "$unit" ]] || die "a run is going with other flags; tpu.sh stop ends it in good order"
    echo "$(hostname): the run is going already"
    return
  fi
  printf '%s\n' "$unit" | sudo tee "$UNIT" >/dev/null
  sudo systemctl daemon-reload
  sudo systemctl reset-failed easyrm 2>/dev/null || true # fails where it never ran
  sudo systemctl enable --quiet --now easyrm
  echo "$(hostname): launched"
}

case ${1-} in
  setup | doctor | launch) "$@" ;;
  *) die "worker.sh setup|doctor|launch, not ${1-nothing}" ;;
esac
