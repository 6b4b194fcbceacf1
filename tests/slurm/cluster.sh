#!/usr/bin/env bash
# A real Slurm on this machine, for tests: munged, slurmctld and NODES slurmd, as root, without systemd.
#   NODES=3 GPUS=1 SHARED="DIR DIR" cluster.sh start ROOT | cluster.sh stop ROOT
# A node is a set of namespaces (network, processes, mounts, host name, shared memory) with a /tmp of its own, in which
# only ROOT and the folders of SHARED are the host's. So it has its own address, its own ports and its own Ray, and
# `kill -9 $(cat ROOT/run/NAME.pid)` is a power cut; ROOT/boot INDEX brings it back. ROOT/login CMD... runs a command on
# the login node. NAMES lists the nodes' names (default node1 ...). ROOT has to be short: sockets lie below it.
set -euo pipefail
ACTION=$1 ROOT=$2
NODES=${NODES:-3} GPUS=${GPUS:-1} CPUS=${CPUS:-8} SHARED=${SHARED:-}
PREFIX=o$(cksum <<<"$ROOT" | cut -c1-5) # of the network namespaces

alive() { kill -0 "$1" 2>/dev/null && ! grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; }

write_config() {
  local i name
  printf 'AutoDetect=off\nName=gpu Type=h800 File=%s/dev/nvidia[0-%d] Flags=nvidia_gpu_env\n' "$ROOT" $((GPUS - 1)) \
    >"$ROOT/etc/gres.conf"
  cat >"$ROOT/etc/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=login(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$ROOT/run/munge.socket
SlurmctldPort=16817
SlurmdPort=16818
SlurmctldPidFile=$ROOT/run/slurmctld.pid
SlurmdPidFile=$ROOT/run/slurmd.%n.pid
SlurmdSpoolDir=$ROOT/spool/%n
StateSaveLocation=$ROOT/state
SlurmctldLogFile=$ROOT/log/slurmctld.log
SlurmdLogFile=$ROOT/log/slurmd.%n.log
PlugStackConfig=/dev/null
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/filetxt
JobCompLoc=$ROOT/log/jobcomp.log
AccountingStorageType=accounting_storage/none
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,requeue_setup_env_fail
SchedulerType=sched/backfill
SlurmdTimeout=${SLURMD_TIMEOUT:-10}
SlurmctldTimeout=10
MessageTimeout=10
KillWait=${KILL_WAIT:-15}
MinJobAge=3600
MaxArraySize=100
CONF
  for ((i = 0; i < NODES; i++)); do
    name=${NAME[i]}
    echo "NodeName=$name NodeAddr=10.77.0.$((11 + i)) CPUs=$CPUS RealMemory=100000 Gres=gpu:h800:$GPUS State=UNKNOWN"
  done >>"$ROOT/etc/slurm.conf"
  cat >>"$ROOT/etc/slurm.conf" <<CONF
PartitionName=gpu Nodes=ALL Default=YES MaxTime=2-00:00:00 DefaultTime=01:00:00 PriorityTier=10 GraceTime=${GRACE:-5}
PartitionName=high Nodes=ALL MaxTime=2-00:00:00 PriorityTier=100 PreemptMode=OFF
CONF
}

# The bridge lies in the login node's namespace: nothing is added to the machine's own network.
write_network() {
  local i
  ip netns add "${PREFIX}c"
  ip -n "${PREFIX}c" link set lo up
  ip -n "${PREFIX}c" link add br0 type bridge
  ip -n "${PREFIX}c" addr add 10.77.0.1/24 dev br0
  ip -n "${PREFIX}c" link set br0 up
  for ((i = 0; i < NODES; i++)); do
    ip netns add "$PREFIX$i"
    ip -n "${PREFIX}c" link add "p$i" type veth peer name eth0 netns "$PREFIX$i"
    ip -n "${PREFIX}c" link set "p$i" master br0 up
    ip -n "$PREFIX$i" link set lo up
    ip -n "$PREFIX$i" addr add "10.77.0.$((11 + i))/24" dev eth0
    ip -n "$PREFIX$i" link set eth0 up
  done
}

write_wrappers() {
  cat >"$ROOT/login" <<LOGIN
#!/bin/bash
export SLURM_CONF=$ROOT/etc/slurm.conf
exec nsenter --net=/run/netns/${PREFIX}c unshare --mount --uts --propagation private bash -c '
  mount --bind $ROOT/etc/hosts /etc/hosts; hostname login; exec "\$@"' login "\$@"
LOGIN
  cat >"$ROOT/boot" <<BOOT
#!/bin/bash
NAME=(${NAME[*]})
name=\${NAME[\$1]}
mkdir -p $ROOT/spool/\$name $ROOT/tmp/\$name
setsid nsenter --net=/run/netns/$PREFIX\$1 unshare --pid --fork --kill-child --mount-proc --uts --mount --ipc \\
  --propagation private $ROOT/init "\$name" </dev/null >$ROOT/log/\$name.init.log 2>&1 &
echo \$! >$ROOT/run/\$name.pid
BOOT
  cat >"$ROOT/init" <<INIT
#!/bin/bash
export SLURM_CONF=$ROOT/etc/slurm.conf PATH=$ROOT/bin/\$1:\$PATH
mount --bind $ROOT/etc/hosts /etc/hosts
mount -t tmpfs tmpfs /dev/shm
for folder in $ROOT $SHARED; do
  case \$folder in /tmp/*) ;; *) continue ;; esac
  mkdir -p "$ROOT/tmp/\$1/\${folder#/tmp/}"
  mount --rbind "\$folder" "$ROOT/tmp/\$1/\${folder#/tmp/}"
done
mount --rbind "$ROOT/tmp/\$1" /tmp
hostname "\$1"
slurmd -D -N "\$1" &
trap 'exit 0' TERM
while :; do sleep 1 & wait \$!; done
INIT
  chmod +x "$ROOT/login" "$ROOT/boot" "$ROOT/init"
}

start() {
  local i up=0
  if [ -n "${NAMES:-}" ]; then read -ra NAME <<<"$NAMES"; else mapfile -t NAME < <(seq -f 'node%g' 1 "$NODES"); fi
  mkdir -p "$ROOT"/{etc,state,spool,log,run,dev,tmp,bin}
  chmod 755 "$ROOT"
  printf '%s\n' "${NAME[@]}" >"$ROOT/etc/names"
  for ((i = 0; i < GPUS; i++)); do mknod "$ROOT/dev/nvidia$i" c 195 "$i"; done # else no CUDA_VISIBLE_DEVICES
  { echo "127.0.0.1 localhost"; echo "10.77.0.1 login"; } >"$ROOT/etc/hosts"
  for ((i = 0; i < NODES; i++)); do echo "10.77.0.$((11 + i)) ${NAME[i]}" >>"$ROOT/etc/hosts"; done
  write_config
  (umask 077 && head -c 1024 /dev/urandom >"$ROOT/etc/munge.key")
  munged --force --key-file="$ROOT/etc/munge.key" --socket="$ROOT/run/munge.socket" --pid-file="$ROOT/run/munged.pid" \
    --log-file="$ROOT/log/munged.log" --seed-file="$ROOT/state/munged.seed" --num-threads=4 2>"$ROOT/log/munged.err"
  write_network
  write_wrappers
  "$ROOT/login" slurmctld
  for ((i = 0; i < NODES; i++)); do "$ROOT/boot" "$i"; done
  for _ in {1..300}; do
    up=$("$ROOT/login" sinfo -h -N -p gpu -t idle -o %N 2>/dev/null | wc -l)
    if [ "$up" = "$NODES" ]; then return; fi
    sleep 0.1
  done
  echo "only $up of $NODES nodes are idle; see $ROOT/log" >&2
  return 1
}

stop() {
  local pids="" pid name
  [ -d "$ROOT/etc" ] || return 0
  for name in $(<"$ROOT/etc/names"); do
    pid=$(cat "$ROOT/run/$name.pid" 2>/dev/null) && alive "$pid" && kill -9 "$pid" # and all its namespace with it
  done
  for name in slurmctld munged; do pids+=" $(cat "$ROOT/run/$name.pid" 2>/dev/null)"; done
  for pid in $pids; do if alive "$pid"; then kill "$pid"; fi; done
  for _ in {1..50}; do
    name=0
    for pid in $pids; do if alive "$pid"; then name=1; fi; done
    [ $name = 0 ] && break
    sleep 0.1
  done
  for pid in $pids; do if alive "$pid"; then kill -9 "$pid"; fi; done
  for name in $(ip netns list | awk -v prefix="^${PREFIX}[0-9c]" '$1 ~ prefix { print $1 }'); do ip netns del "$name"; done
  rm -rf "$ROOT"
}

set +e
if [ "$ACTION" = stop ]; then stop; else set -e; start; fi
