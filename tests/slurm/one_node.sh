#!/usr/bin/env bash
# SLURM with one node on this machine, out of Debian's packages, all of it in one folder:
#
#   tests/slurm/one_node.sh start FOLDER     # installs slurm-wlm and munge if they are missing and it may
#   export SLURM_CONF=FOLDER/slurm.conf      # now sbatch, squeue, scontrol, scancel, sinfo work
#   tests/slurm/one_node.sh stop FOLDER
#
# Partition main pre-empts partition low, whose jobs get GRACE_SECONDS (default 60) to save themselves and go back into
# the queue. Nothing outside FOLDER is written, no running SLURM or munge is touched, and ports are free ones.
# Exit code 3 and one line where it can not be done here: no root, no Debian packages, no network.
set -euo pipefail

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
}

cannot() {
    echo "no one-node SLURM here: $*" >&2
    exit 3
}

install_packages() {
    [ "$(id -u)" = 0 ] || cannot "slurmctld, slurmd and munged are started as root, this is $(id -un)"
    command -v slurmctld slurmd munged >/dev/null && return
    command -v apt-get >/dev/null || cannot "slurm-wlm and munge are not installed, and there is no apt-get"
    {
        apt-get update
        # no service starts: policy-rc.d would be asked, and a container has no init
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurm-wlm munge
    } >"$1/install.log" 2>&1 || cannot "apt-get could not install slurm-wlm and munge: $(tail -n 1 "$1/install.log")"
    command -v slurmctld slurmd munged >/dev/null || cannot "slurm-wlm and munge are installed, and slurmd is not there"
}

free_ports() {
    python3 - <<'PYTHON'
import socket
sockets = [socket.socket() for _ in range(2)]
for s in sockets:
    s.bind(("", 0))
print(*(s.getsockname()[1] for s in sockets))
PYTHON
}

start() {
    mkdir -p "$1"
    local folder controller_port node_port
    folder=$(cd "$1" && pwd)
    install_packages "$folder"
    [ ! -s "$folder/slurmctld.pid" ] || cannot "$folder has one already; stop it first"
    # root's munged accepts only folders that no one else can write, all the way up; so /run, not /tmp
    munge=$(mktemp -d /run/moviegen-munge.XXXXXX)
    chmod 755 "$munge"
    echo "$munge" >"$folder/munge"
    mkdir -p "$folder"/{state,spool}
    read -r controller_port node_port < <(free_ports)
    (umask 077 && head -c 1024 /dev/urandom >"$munge/key")
    cat >"$folder/slurm.conf" <<CONF
ClusterName=onenode
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a requeued job waits until its old credential has expired: 120 s by default
AuthInfo=socket=$munge/socket,cred_expire=5
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=${KILL_WAIT_SECONDS:-30}
ReturnToService=2
MpiDefault=none
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=${GRACE_SECONDS:-60}
PartitionName=main Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    munged --force --key-file="$munge/key" --socket="$munge/socket" --pid-file="$munge/pid" \
        --log-file="$munge/log" --seed-file="$munge/seed" || cannot "munged does not start: $(tail -n 1 "$munge/log")"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -c || cannot "slurmctld does not start: $(tail -n 1 "$folder/slurmctld.log")"
    slurmd || cannot "slurmd does not start: $(tail -n 1 "$folder/slurmd.log")"
    for _ in $(seq 120); do
        if [ "$(sinfo --noheader --partition=low --format=%T 2>/dev/null)" = idle ]; then
            echo "export SLURM_CONF=$folder/slurm.conf"
            return
        fi
        sleep 0.5
    done
    cannot "its node is not idle after a minute: see $folder/slurmctld.log and $folder/slurmd.log"
}

stop() {
    local folder=$1 pid_file pid munge
    munge=$(cat "$folder/munge" 2>/dev/null || true)
    export SLURM_CONF=$folder/slurm.conf
    [ ! -s "$folder/slurmctld.pid" ] || timeout 20 scancel --quiet --user="$(id -un)" 2>/dev/null || true
    for pid_file in "$folder/slurmd.pid" "$folder/slurmctld.pid" ${munge:+"$munge/pid"}; do
        pid=$(cat "$pid_file" 2>/dev/null || true)
        [ -n "$pid" ] || continue
        kill "$pid" 2>/dev/null || continue
        for _ in $(seq 100); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.1
        done
    done
    case $munge in
    /run/moviegen-munge.*) rm -rf "$munge" ;;
    esac
    rm -f "$folder/slurmctld.pid" "$folder/slurmd.pid" "$folder/munge"
}

[ $# = 2 ] || usage
case $1 in
start | stop) "$1" "$2" ;;
*) usage ;;
esac
