#!/usr/bin/env bash
# Trains on a GKE cluster of TPU slices with xpk (pip install xpk). launch/pod.env holds the settings.
#
#   launch/gke.sh [--dry-run] [--env FILE] COMMAND [ARGUMENT …]        arguments of the job, for run and resume
#     create    creates the cluster, or changes its number of slices
#     image     builds and pushes the container of COMMIT
#     run       starts training; Kubernetes restarts it, and it resumes from WORKDIR's last checkpoint
#     resume    after Kubernetes has given up: removes the old job and starts a new one
#     status    lists the cluster's jobs
#     logs      follows the first worker's log
#     stop      ends the job
#     delete    deletes the cluster
set -euo pipefail
commands="create image run resume status logs stop delete"
one_host='v6e-[14]|v(4|5p)-8'
# shellcheck source=launch/pod.sh
source "$(dirname "$0")/pod.sh"
need IMAGE '[a-z0-9][-a-z0-9.]*(/[-a-zA-Z0-9_.]+)+' 'a container image without a tag, as in us-docker.pkg.dev/project/repository/emu-jax'
need MAX_RESTARTS '[0-9]+' 'a number, 0 or more'
need GRACE_SECONDS '[0-9]+' 'a number, 0 or more'
case "$CAPACITY" in
  reserved)
    need RESERVATION '[a-z].*' "the reservation's name, for CAPACITY is reserved"
    capacity="--reservation=$RESERVATION"
    ;;
  *) capacity="--$CAPACITY" ;;
esac

cluster=("--cluster=$NAME" "--project=$PROJECT" "--zone=$ZONE")
slices=("--tpu-type=$ACCELERATOR_TYPE" "--num-slices=$SLICES")

create() {
  local flags=("$capacity") of_cluster=() of_nodes=()
  [ -z "$NETWORK" ] || of_cluster+=("--network=$NETWORK")
  [ -z "$SUBNETWORK" ] || of_cluster+=("--subnetwork=$SUBNETWORK")
  [ -z "$SERVICE_ACCOUNT" ] || of_cluster+=("--service-account=$SERVICE_ACCOUNT")
  [ -z "$SERVICE_ACCOUNT" ] || of_nodes+=("--service-account=$SERVICE_ACCOUNT")
  [ -z "$LABELS" ] || of_nodes+=("--labels=$LABELS") # the cluster's are xpk's own
  [ "$INTERNAL_IPS" != yes ] || flags+=(--private)
  [ -z "${of_cluster[*]-}" ] || flags+=("--custom-cluster-arguments=${of_cluster[*]}")
  [ -z "${of_nodes[*]-}" ] || flags+=("--custom-nodepool-arguments=${of_nodes[*]}")
  run xpk cluster create "${cluster[@]}" "${slices[@]}" "${flags[@]}"
}

image() {
  local tag
  tag="$(quoted "$IMAGE:$commit")"
  warn_of_changes
  need_program docker
  run_line "git archive $commit | docker build --file=launch/Dockerfile --build-arg=EXTRAS=$extras --tag=$tag -"
  run docker push "$IMAGE:$commit"
}

start() {
  # Exit codes of emu-jax train: 1 after a crash, 69 after the loss of a worker, 75 after what passes, such as a stop with
  # a saved checkpoint. Kubernetes restarts the job after these, but not after 2 (a wrong setting) or 70 (it diverged).
  local line
  line="${environment}emu-jax $(quoted "${job[@]}")"
  # Kubernetes reads $(NAME) in a command as a variable, and $$ as $.
  run xpk workload create "--workload=$NAME" "${cluster[@]}" "${slices[@]}" "--docker-image=$IMAGE:$commit" \
    "--max-restarts=$MAX_RESTARTS" --restart-on-exit-codes=1,69,75 "--termination-grace-period-seconds=$GRACE_SECONDS" \
    "--command=${line//\$/\$\$}"
}

stop() {
  run xpk workload delete "--workload=$NAME" "${cluster[@]}" --force
}

resume() {
  stop || true # there may be no job
  start
}

status() {
  run xpk workload list "${cluster[@]}"
}

logs() {
  local labels="jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0"
  run gcloud container clusters get-credentials "$NAME" "--project=$PROJECT" "--region=${ZONE%-*}"
  run kubectl logs "--selector=$labels,batch.kubernetes.io/job-completion-index=0" --all-containers --tail=100 --follow
}

delete() {
  run xpk cluster delete "${cluster[@]}" --force
}

case "$command" in
  run) start ;;
  *) "$command" ;;
esac
