#!/usr/bin/env bash
# Run dfkd_jax on a Cloud TPU slice, and go on after preemption.
#
#   NAME=dfkd ZONE=us-central2-b NFS=10.0.0.2:/share \
#     launch/tpu_pod.sh [--dry-run] --config=FILE[:METHOD] --workdir=/mnt/nfs/DIR [more flags]
#   NAME=dfkd ZONE=us-central2-b launch/tpu_pod.sh [--dry-run] --delete
#
# It looks at the slice and at the run on it, does the step that is missing, and looks again:
# creates the slice, installs and starts on every worker, streams the log of worker 0. A slice that
# was preempted is deleted, created again, and the run goes on from its --workdir. When this script
# is interrupted the run goes on; the same command follows it again. The slice remains, and is paid
# for, until --delete. Environment:
#   NAME, ZONE    the slice
#   PROJECT       the Google Cloud project (gcloud's default)
#   ACCELERATOR   its type (v4-32)
#   VERSION       its software (tpu-ubuntu2204-base; v5e: v2-alpha-tpuv5-lite, v6e: v2-alpha-tpuv6e)
#   SPOT=1        cheaper, and may be preempted
#   QUEUED=1      ask by a queued resource, which waits until there is capacity
#   REPO          what to install: a folder, which is copied (this repository), or a git URL
#   NFS           SERVER:/SHARE, such as a Filestore instance in the slice's network, mounted at
#                 /mnt/nfs on every worker. All workers must see the same --workdir, and it must
#                 outlive the slice. A gs:// bucket cannot be a --workdir.
#   POLL          seconds between looks at the slice (30)
set -euo pipefail

say() { echo "tpu_pod.sh: $*" >&2; }
fail() {
  say "$2"
  exit "$1"
}

dry_run=${DRY_RUN:-}
workdir='' config='' delete=''
flags=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=1 && continue ;;
    --delete) delete=1 && continue ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
    --config=*) config=${argument#*=} ;;
    --workdir=*) workdir=${argument#*=} ;;
  esac
  flags+=("$argument")
done
NAME=${NAME:-} ZONE=${ZONE:-} NFS=${NFS:-} QUEUED=${QUEUED:-} POLL=${POLL:-30}
REPO=${REPO:-$(cd "$(dirname "$0")/.." && pwd)}
[[ $NAME ]] || fail 2 "NAME is missing; set NAME to the name of the slice."
[[ $ZONE ]] || fail 2 "ZONE is missing; set ZONE to the zone of the slice, such as us-central2-b."
if [[ ! $delete ]]; then
  [[ $config ]] || fail 2 "--config is missing; give --config=configs/cifar100.py."
  [[ $workdir ]] || fail 2 "--workdir is missing; give --workdir=DIR, a folder that all workers share."
  [[ $workdir != gs://* ]] ||
    fail 2 "--workdir is '$workdir'; a bucket cannot be one, give a folder that all workers share."
  [[ ! $NFS || $workdir == /mnt/nfs/* ]] ||
    fail 2 "--workdir is '$workdir'; with NFS it lies below /mnt/nfs."
  [[ -d $REPO || $REPO == *:* ]] || fail 2 "REPO is '$REPO', which is neither a folder nor a git URL."
  [[ $NFS ]] || say "without NFS the workers must already share $workdir, and it must outlive them."
fi
[[ $dry_run ]] || command -v gcloud >/dev/null ||
  fail 2 "gcloud is not on the PATH; install the Google Cloud CLI, or use --dry-run."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'fail 130 "interrupted; a run that was started goes on: the same command follows it, --delete ends it."' INT

run() { # a command, or in a dry run what one would type
  if [[ ! $dry_run ]]; then
    "$@"
    return
  fi
  local word apostrophe="'\\''"
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./:=,+-]*) printf "'%s' " "${word//\'/$apostrophe}" ;;
      *) printf '%s ' "$word" ;;
    esac
  done
  echo
}
tpus() { run gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet; }

# --- the slice ------------------------------------------------------------------------------------

create() {
  local what=("--accelerator-type=${ACCELERATOR:-v4-32}" ${SPOT:+"--spot"})
  local version=${VERSION:-tpu-ubuntu2204-base}
  if [[ $QUEUED ]]; then
    tpus queued-resources create "$NAME" --node-id="$NAME" "${what[@]}" --runtime-version="$version"
  else
    tpus tpu-vm create "$NAME" "${what[@]}" --version="$version"
  fi
}

delete() {
  if [[ $QUEUED ]]; then
    tpus queued-resources delete "$NAME" --force # with the slice
  else
    tpus tpu-vm delete "$NAME"
  fi
}

slice() { tpus tpu-vm describe "$NAME" --format='value(state)'; }
request() { tpus queued-resources describe "$NAME" --format='value(state.state)'; }

# The slice's state, or its request's while there is no slice yet; ABSENT; UNKNOWN.
describe() {
  slice 2>"$scratch/error" && return
  [[ $QUEUED ]] && request 2>"$scratch/error" && return
  if grep -qiE 'not.?found' "$scratch/error"; then
    echo ABSENT
  else
    cat "$scratch/error" >&2
    echo UNKNOWN
  fi
}

# --- the run on it --------------------------------------------------------------------------------

# on WORKER|all COMMAND; a connection to a slice that is gone breaks after a minute.
on() {
  local alive="-oConnectTimeout=15 -oServerAliveInterval=15 -oServerAliveCountMax=4"
  tpus tpu-vm ssh "$NAME" --worker="$1" --ssh-flag="$alive" --command="$2"
}

quoted() { printf ' %q' "$@"; }

install() {
  local fetch
  if [[ -d $REPO ]]; then
    run tar -czf "$scratch/dfkd_jax.tar.gz" --exclude=./.git --exclude=./.venv --exclude=./runs \
      -C "$REPO" . &&
      tpus tpu-vm scp "$scratch/dfkd_jax.tar.gz" "$NAME:" --worker=all || return
    fetch="mkdir -p dfkd_jax && tar -xzf dfkd_jax.tar.gz -C dfkd_jax"
  else
    fetch="if [ -d dfkd_jax ]; then git -C dfkd_jax pull -q --ff-only"
    fetch+="; else git clone -q$(quoted "$REPO") dfkd_jax; fi"
  fi
  on all "$fetch && dfkd_jax/launch/tpu_worker.sh install${NFS:+$(quoted "$NFS")}"
}

start() { on all "dfkd_jax/launch/tpu_worker.sh start$(quoted "${flags[@]}")"; }
follow() { on 0 "dfkd_jax/launch/tpu_worker.sh follow $1"; }

# running, finished, none or "exit CODE"; nothing when worker 0 does not answer.
status() {
  local worker=dfkd_jax/launch/tpu_worker.sh ask
  ask="if [ -x $worker ]; then $worker status$(quoted "$workdir"); else echo 'run: none'; fi"
  if [[ $dry_run ]]; then on 0 "$ask"; else on 0 "$ask" | sed -n 's/^run: //p'; fi
}

# --- what to do -----------------------------------------------------------------------------------

if [[ $delete ]]; then
  delete
  exit
fi

if [[ $dry_run ]]; then
  echo "# How is the slice?" && slice
  [[ ! $QUEUED ]] || request
  echo "# If it is absent:" && create
  echo "# How is the run?" && status
  echo "# If there is none:" && install && start
  echo "# The log, until the run ends; then the slice and the run again:" && follow +1
  echo "# If the slice was preempted, before it is created again:" && delete
  exit
fi

failures=0
failed() { # a step did not work: perhaps the slice is being lost, which shows in its state soon
  failures=$((failures + 1))
  ((failures < 5)) || fail 1 "five attempts in a row failed; the last message says why."
  sleep "$POLL"
}

seen='' started='' # whether this script saw the slice ready, and started the run
while :; do
  state=$(describe)
  [[ $state == READY ]] || say "the slice $NAME is $state."
  case $state in
    READY) seen=1 ;;
    ABSENT)
      [[ ! $seen ]] || fail 1 "somebody deleted it; the same command creates it again."
      create || failed
      continue
      ;;
    PREEMPTED | TERMINATED | FAILED | SUSPENDED)
      delete || failed
      seen='' started=''
      continue
      ;;
    STOPPED | HIDDEN) fail 1 "start the slice $NAME yourself, or remove it with --delete." ;;
    UNKNOWN) failed && continue ;;
    *) sleep "$POLL" && continue ;; # CREATING, WAITING_FOR_RESOURCES, REPAIRING, DELETING, …
  esac

  outcome=$(status) || true
  case $outcome in
    '') failed && continue ;;
    running)
      failures=0
      follow 20 || true # it was already followed, or is found running
      continue
      ;;
    finished)
      say "the run is finished; --delete removes the slice $NAME."
      exit 0
      ;;
  esac
  if [[ $started ]]; then # it has ended: by itself, or because the slice is being lost
    started=''
    sleep "$POLL"
    # 75: it was stopped on request, and is to go on.
    if [[ $outcome == "exit "[1-9]* && $outcome != "exit 75" && $(describe) == READY ]]; then
      on all "tail -n 20 dfkd_jax/run.log" || true
      fail "${outcome#exit }" "the run failed with exit code ${outcome#exit }; above are the ends of the workers' logs."
    fi
    continue
  fi
  if install && start; then
    started=1 failures=0
    follow +1 || true # until the run ends or the connection breaks
  else
    failed
  fi
done
