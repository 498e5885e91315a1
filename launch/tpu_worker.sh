#!/usr/bin/env bash
# What tpu_pod.sh runs on a worker of the slice, in the folder that holds this repository.
#
#   tpu_worker.sh install [SERVER:/SHARE]   mount the share at /mnt/nfs, install dfkd_jax
#   tpu_worker.sh start FLAGS...            start the run in the background
#   tpu_worker.sh status WORKDIR            print "run: running", "run: finished", "run: none", or
#                                           "run: exit CODE" (75: stopped on request)
#   tpu_worker.sh follow LINES              print the log's last LINES (+1: all), then what comes,
#                                           until the run ends
#
# A run holds a lock on run.lock for as long as one of its processes lives; a restart of the machine
# frees it.
set -euo pipefail
cd "$(dirname "$0")/.."

case $1 in
  install)
    if [[ ${2:-} ]] && ! mountpoint -q /mnt/nfs; then
      sudo apt-get -o DPkg::Lock::Timeout=300 -qq install -y nfs-common
      sudo mkdir -p /mnt/nfs
      sudo mount "$2" /mnt/nfs
      sudo chmod a+rwx /mnt/nfs
    fi
    # The system's Python (3.10 on tpu-ubuntu2204-base) is too old; uv brings one that is not.
    python3 -m pip install -q --user uv
    [[ -x .venv/bin/python ]] || ~/.local/bin/uv venv -q --python 3.11 .venv
    ~/.local/bin/uv pip install -q --python .venv/bin/python -e '.[tpu]'
    ;;
  start)
    exec 9>run.lock
    flock -w 300 9 # what is left of an earlier start ends when its peers are gone
    rm -f run.exit
    : >run.log
    (
      trap '' HUP # it outlives the connection
      code=0
      PYTHONUNBUFFERED=1 .venv/bin/python -m dfkd_jax.main --distributed=cluster "${@:2}" || code=$?
      echo "$code" >run.exit
    ) </dev/null >>run.log 2>&1 & # with the lock: it inherits file descriptor 9
    ;;
  status)
    if ! flock -ns run.lock true; then
      echo "run: running"
    elif [[ -e $2/summary.json ]]; then
      echo "run: finished"
    elif [[ -s run.exit ]]; then
      echo "run: exit $(<run.exit)"
    else
      echo "run: none"
    fi
    ;;
  follow)
    tail -n "$2" -s 0.5 -F run.log &
    flock -s run.lock true # until the run ends
    sleep 1 # tail shows the last lines
    kill $!
    ;;
  *)
    echo "tpu_worker.sh: '$1' is none of install, start, status and follow." >&2
    exit 2
    ;;
esac
