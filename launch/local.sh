#!/usr/bin/env bash
# Run dfkd_jax on all devices of this machine.
#
#   launch/local.sh [--dry-run] --config=FILE[:METHOD] --workdir=DIR [more flags of dfkd_jax.main]
#
# One process drives all devices. Environment:
#   PYTHON             the interpreter (python3)
#   PROCESSES          how many processes instead of one; they share the GPUs evenly and meet on
#                      the loopback interface
#   EMULATED_DEVICES   run on the CPU, which each process divides into this many devices
#   PORT               where the processes meet (a free port)
#   GRACE              when one process fails, seconds that the others get to end (10)
#
# SIGTERM and Ctrl-C are passed on once: the run finishes its epoch, saves and ends; the same
# command goes on from there. The exit code is that of the first process that failed, else 75 if the
# run was stopped.
set -euo pipefail

fail() {
  echo "local.sh: $1" >&2
  exit 2
}

dry_run=${DRY_RUN:-}
flags=()
for argument in "$@"; do
  case $argument in
    --dry-run) dry_run=1 ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
    *) flags+=("$argument") ;;
  esac
done
[[ " $*" == *" --config="* ]] || fail "--config is missing; give --config=configs/digits.py."
[[ " $*" == *" --workdir="* ]] || fail "--workdir is missing; give --workdir=DIR for the results."

processes=${PROCESSES:-1}
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES is '$processes'; it is a number from 1 on."
[[ ${EMULATED_DEVICES:-1} =~ ^[1-9][0-9]*$ ]] ||
  fail "EMULATED_DEVICES is '$EMULATED_DEVICES'; it is a number from 1 on."

command=(env)
if [[ ${EMULATED_DEVICES:-} ]]; then
  count=--xla_force_host_platform_device_count=$EMULATED_DEVICES
  command+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }$count")
fi
program=("${PYTHON:-python3}" -m dfkd_jax.main "${flags[@]}")

if ((processes == 1)); then
  command+=("${program[@]}")
  [[ $dry_run ]] && printf '%q ' "${command[@]}" && echo && exit
  exec "${command[@]}"
fi

# The GPUs by number, those that CUDA_VISIBLE_DEVICES allows or else all, in equal parts.
if [[ ! ${EMULATED_DEVICES:-} ]]; then
  if [[ ${CUDA_VISIBLE_DEVICES:-} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  else
    mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)
  fi
  share=$((${#gpus[@]} / processes))
  ((share > 0 && share * processes == ${#gpus[@]})) ||
    fail "PROCESSES is $processes, which does not divide ${#gpus[@]} GPUs; EMULATED_DEVICES=N uses the CPU."
fi

# A port is free when nothing answers there.
port=${PORT:-}
while [[ ! $port ]]; do
  port=$((20000 + RANDOM % 10000))
  if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then port=; fi
done

pids=()
# shellcheck disable=SC2329 # the traps call it
pass_on() {
  echo "local.sh: SIG$1, passed on to the processes." >&2
  kill -s "$1" "${pids[@]}" 2>/dev/null || true
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

for ((id = 0; id < processes; id++)); do
  child=("${command[@]}")
  if [[ ! ${EMULATED_DEVICES:-} ]]; then
    part=$(IFS=,; echo "${gpus[*]:id*share:share}")
    child+=("CUDA_VISIBLE_DEVICES=$part")
  fi
  child+=("${program[@]}" --coordinator="127.0.0.1:$port"
    --num_processes="$processes" --process_id="$id")
  if [[ $dry_run ]]; then
    printf '%q ' "${child[@]}" && echo '&'
    continue
  fi
  # Job control puts each process in a group of its own: the terminal's Ctrl-C then reaches it
  # only through this script. A second one would end it without saving.
  set -m
  "${child[@]}" </dev/null &
  set +m
  pids+=($!)
done
[[ ! $dry_run ]] || exit 0

# When one has failed the others cannot go on, and may not end by themselves: they wait for it.
status=0 stopped=0 deadline=
while ((${#pids[@]})); do
  sleep 0.2 || true # a signal may end it
  alive=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      alive+=("$pid")
    elif wait "$pid"; then
      : # finished
    else
      code=$?
      if ((code == 75)); then
        stopped=$code # on request, as the others are
      elif ((status == 0)); then
        status=$code
      fi
    fi
  done
  pids=("${alive[@]}")
  if ((status && ${#pids[@]})) && [[ ! $deadline ]]; then
    echo "local.sh: a process ended with exit code $status; the others are ended." >&2
    kill -s TERM "${pids[@]}" 2>/dev/null || true
    deadline=$((SECONDS + ${GRACE:-10}))
  fi
  if [[ $deadline ]] && ((SECONDS >= deadline)); then
    for pid in "${pids[@]}"; do kill -s KILL -- "-$pid" 2>/dev/null || true; done
  fi
done
((status)) || status=$stopped
exit "$status"
