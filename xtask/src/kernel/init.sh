#!/bin/busybox sh
# Process 1 of the machine that `cargo xtask test --kernel` or `bench ipvs` boots. xtask appends what
# to run.
/bin/busybox mkdir -p /applets /dev /etc /proc /root /run /sys /tmp
/bin/busybox --install -s /applets
# Programs of the host before busybox's own.
export PATH=/bin:/sbin:/applets HOME=/root
# The kernel checks a program of a hundred thousand steps for ten seconds here.
export VIADUCT_TEST_PATIENCE=5
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup /sys/fs/cgroup
# Modules are loaded when something asks for them, as on any host. But busybox's modprobe does not
# wait for one that another is loading, and all labs ask for veth and bridge at once; and nothing asks
# for fou.
echo /applets/modprobe > /proc/sys/kernel/modprobe
modprobe -a veth bridge fou fou6
ip link set lo up
ulimit -n 1048576

run() {
    name=$1
    shift
    echo "=== $name starts on $(uname -r)"
    "/tests/$name" "$@"
    printf "\n=== %s ended with %s\n" "$name" $?
}

