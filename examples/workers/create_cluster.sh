#!/bin/sh
# Makes a cluster of the nodes that are given as host:port, masters first, with a replica for each, unless they are one
# already; returns when the replicas follow.
set -eu

ask() {
    node=$1
    shift
    valkey-cli -h "${node%:*}" -p "${node##*:}" "$@"
}

if ask "$1" cluster info | grep -q '^cluster_slots_assigned:0'; then
    valkey-cli --cluster create "$@" --cluster-replicas 1 --cluster-yes
fi
for node in "$@"; do
    # Masters take no writes without a replica: see min-replicas-to-write.
    until ask "$node" info replication | grep -Eq 'state=online|master_link_status:up'; do sleep 0.5; done
done
