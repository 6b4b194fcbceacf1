#!/usr/bin/env bash
# Ray over hosts that ssh reaches, without Slurm: all of them or none.
#   launch/ray_cluster.sh start HOST...     the first is the head, and where training is then started
#   launch/ray_cluster.sh stop HOST...
# Every host has this checkout and its Python under the same path (PYTHON, default .venv/bin/python). Settings: GPUS a
# host (default: what nvidia-smi counts there), PORT (default 6379; the head takes the next one too), OBJECT_STORE_GB (8),
# DEADLINE_S (300), SSH (ssh).
# The hosts share a file system for run folder, model and problems. At its end `start` prints the command to train with.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$ROOT/.venv/bin/python} PORT=${PORT:-6379} SSH=${SSH:-ssh}
OBJECT_STORE_GB=${OBJECT_STORE_GB:-8} DEADLINE_S=${DEADLINE_S:-300}
STATE=/tmp/or1-ray-$(id -un)-$PORT # on each host: pid, token and log of what was started there

fail() { echo "ray_cluster: error: $*" >&2; exit 2; }
[ $# -ge 2 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
ACTION=$1
shift
HOSTS=("$@") STARTED=()
case $ACTION in start | stop) ;; *) fail "$ACTION: use start or stop" ;; esac
[ "$(printf '%s\n' "${HOSTS[@]}" | sort -u | wc -l)" = $# ] || fail "a host is named twice"

on() { # HOST SCRIPT WORDS...: runs a bash script on a host, whose shell takes the words apart again
  local host=$1 script=$2
  shift 2
  $SSH -o BatchMode=yes -o ConnectTimeout=10 "$host" "bash -s -- $(printf '%q ' "$@")" <<<"$script"
}

# Only what was started here: the group of the pid in STATE, unless that pid is another process by now. A start that
# failed early left no pid.
# shellcheck disable=SC2016  # expanded on the host
STOP='if pid=$(cat "$1/pid" 2>/dev/null) &&
  { [ ! -e "/proc/$pid" ] || grep -qa "ray.scripts.scripts" "/proc/$pid/cmdline"; }; then
  kill -TERM -- "-$pid" 2>/dev/null
  for _ in 1 2 3 4 5 6 7 8 9 10; do kill -0 -- "-$pid" 2>/dev/null || break; sleep 1; done
  kill -KILL -- "-$pid" 2>/dev/null
fi
rm -rf "$1"'

stop() { # HOST...
  local host status=0
  for host in "$@"; do on "$host" "$STOP" "$STATE" || { echo "ray_cluster: $host did not answer" >&2; status=1; }; done
  return $status
}

# shellcheck disable=SC2016
START='state=$1 root=$2 python=$3 port=$4 head=$5 gpus=$6 store=$7 peer=$8
mkdir -m 700 "$state" || { echo "a Ray was started here and not stopped: ray_cluster.sh stop" >&2; exit 1; }
trap "rm -rf \"\$state\"" EXIT
[ -x "$python" ] || { echo "no Python at $python" >&2; exit 1; }
[ -n "$gpus" ] || gpus=$(nvidia-smi -L 2>/dev/null | grep -c "^GPU ")
peer=$(getent ahostsv4 "$peer" | cut -d" " -f1 | head -1)
own=$(ip -4 -o route get "${head:-$peer}" 2>/dev/null | sed -n "s/.* src \([0-9.]*\).*/\1/p")
[ -n "$own" ] || { echo "no route to ${head:-$peer}" >&2; exit 1; }
if [ -n "$head" ]; then join=--address=$head:$port; else join="--head --port=$port --ray-client-server-port=$((port + 1)) --include-dashboard=false"; fi
interface=$(ip -4 -o addr show | awk -v own="$own" "{ split(\$4, part, \"/\"); if (part[1] == own) print \$2 }" | head -1)
printf %s "$token" >"$state/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token RAY_USAGE_STATS_ENABLED=0 OMP_WAIT_POLICY=PASSIVE
export PYTHONPATH=$root GLOO_SOCKET_IFNAME=$interface NCCL_SOCKET_IFNAME=$interface
eval "$(sed -n "s/^\([A-Z_]*\)=\([^ ]*\).*/export \1=\"\${\1:-\2}\"/p" "$root/slurm/cluster.env")"
unset RAY_ADDRESS
cd "$root" && ulimit -n 65535 2>/dev/null
# shellcheck disable=SC2086
setsid nohup "$python" -m ray.scripts.scripts start --block $join --node-ip-address="$own" --num-cpus=1 \
  --num-gpus="$gpus" --object-store-memory=$((store * 1073741824)) --temp-dir="$state/ray" \
  --include-log-monitor=false </dev/null >"$state/log" 2>&1 &
echo $! >"$state/pid"
trap - EXIT
echo "$own $gpus"'

await_head() {
  # shellcheck disable=SC2016
  on "${HOSTS[0]}" 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$1/token
end=$(($(date +%s) + $4))
until "$2" -m ray.scripts.scripts health-check --address="$3" >/dev/null 2>&1; do
  [ "$(date +%s)" -lt "$end" ] || { echo "no Ray at $3 after $4 s" >&2; tail -3 "$1/log" >&2; exit 1; }
done' "$STATE" "$PYTHON" "$address:$PORT" "$DEADLINE_S"
}

stop_started() {
  [ "${#STARTED[@]}" -gt 0 ] || return 0
  echo "ray_cluster: stopping what was started" >&2
  stop "${STARTED[@]}" || true
}

start() {
  local host answer address="" total=0 token
  token=$(od -An -tx1 -N32 /dev/urandom | tr -d ' \n')
  trap stop_started EXIT
  for host in "${HOSTS[@]}"; do
    # The token goes with the script, by stdin: everybody on a host sees the words of a command.
    answer=$(on "$host" "token=$token"$'\n'"$START" \
      "$STATE" "$ROOT" "$PYTHON" "$PORT" "$address" "${GPUS:-}" "$OBJECT_STORE_GB" "${HOSTS[1]:-$host}")
    STARTED+=("$host")
    if [ -z "$address" ]; then
      address=${answer% *}
      await_head
    fi
    total=$((total + ${answer##* }))
    echo "$host: $answer GPUs"
  done
  echo "waiting for ${#HOSTS[@]} nodes and $total GPUs at $address:$PORT"
  # shellcheck disable=SC2016
  on "${HOSTS[0]}" 'cd "$2" && export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$1/token PYTHONPATH=$2
export RAY_ADDRESS=$4 OR1_RAY_NODES=$5 OR1_RAY_GPUS=$6 OR1_RAY_DEADLINE_S=$7
exec "$3" -m or1_megatron.cluster' \
    "$STATE" "$ROOT" "$PYTHON" "$address:$PORT" "${#HOSTS[@]}" "$total" "$DEADLINE_S"
  trap - EXIT
  cat <<TRAIN
on ${HOSTS[0]}, in $ROOT:
  RAY_ADDRESS=$address:$PORT OR1_RAY_NODES=${#HOSTS[@]} OR1_RAY_GPUS=$total RAY_AUTH_MODE=token \\
  RAY_AUTH_TOKEN_PATH=$STATE/token $PYTHON -m or1_megatron train RECIPE
TRAIN
}

if [ "$ACTION" = stop ]; then stop "${HOSTS[@]}"; else start; fi
