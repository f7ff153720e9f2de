#!/usr/bin/env bash
# Trains on Cloud TPU VMs: one or more slices, created at once or queued. launch/pod.env holds the settings.
#
#   launch/tpu-vm.sh [--dry-run] [--env FILE] COMMAND [ARGUMENT …]        arguments of the job, for run and resume
#     create    requests the slices and waits for them
#     install   stops the job and installs the repository at COMMIT on every worker
#     run       starts training on every worker; it resumes from WORKDIR's last checkpoint
#     resume    after a crash or a preemption: recreates lost slices and starts training
#     status    shows the state of the slices and of every worker's job
#     logs      follows the first worker's log
#     stop      stops the job on every worker
#     delete    deletes the slices
set -euo pipefail
commands="create install run resume status logs stop delete"
one_host='v(5litepod|6e)-[148]|v(4|5p)-8'
# shellcheck source=launch/pod.sh
source "$(dirname "$0")/pod.sh"
need RUNTIME_VERSION '[a-z0-9][-a-z0-9.]*' 'a TPU runtime version such as v2-alpha-tpuv6e'
need QUEUED 'yes|no' 'yes or no'
need ARCHIVES 'gs://[^/]+(/.+)?' 'a folder in a bucket, gs://…'
[ "$QUEUED" = yes ] || [ "$SLICES" = 1 ] ||
  refuse "SLICES=$SLICES with QUEUED=no; expected QUEUED=yes, which several slices need; set it in $env_file"
need SSH 'external-ip|internal-ip|iap' 'external-ip, internal-ip or iap'
case "$SSH:$INTERNAL_IPS:$QUEUED" in
  iap:*:no) refuse "SSH=iap with QUEUED=no; expected QUEUED=yes, whose ssh knows the tunnel; set it in $env_file" ;;
  iap:*) route=(--tunnel-through-iap) ;;
  internal-ip:*) route=(--internal-ip) ;;
  *:yes:*) refuse "SSH=$SSH with INTERNAL_IPS=yes; expected internal-ip or iap; set it in $env_file" ;;
  *) route=() ;;
esac

where=("--project=$PROJECT" "--zone=$ZONE")
if [ "$QUEUED" = yes ]; then
  tpu=(gcloud compute tpus queued-resources)
  first=(--node=0 --worker=0)
  all=(--node=all --worker=all)
  state_field=state.state
else
  tpu=(gcloud compute tpus tpu-vm)
  first=(--worker=0)
  all=(--worker=all)
  state_field=state
fi

create() {
  local flags=("--accelerator-type=$ACCELERATOR_TYPE")
  if [ "$QUEUED" = no ]; then
    flags+=("--version=$RUNTIME_VERSION")
  elif [ "$SLICES" = 1 ]; then
    flags+=("--runtime-version=$RUNTIME_VERSION" "--node-id=$NAME")
  else
    flags+=("--runtime-version=$RUNTIME_VERSION" "--node-count=$SLICES" "--node-prefix=$NAME")
  fi
  [ "$CAPACITY" = on-demand ] || flags+=("--$CAPACITY")
  [ -z "$NETWORK" ] || flags+=("--network=$NETWORK")
  [ -z "$SUBNETWORK" ] || flags+=("--subnetwork=$SUBNETWORK")
  [ "$INTERNAL_IPS" != yes ] || flags+=(--internal-ips)
  [ -z "$SERVICE_ACCOUNT" ] || flags+=("--service-account=$SERVICE_ACCOUNT")
  [ -z "$LABELS" ] || flags+=("--labels=$LABELS")
  run "${tpu[@]}" create "$NAME" "${where[@]}" "${flags[@]}"
  await
}

state() {
  run "${tpu[@]}" describe "$NAME" "${where[@]}" "--format=value($state_field)"
}

# A queued request may wait for days for chips; a failed one would wait forever.
await() {
  local now
  if [ "$dry_run" = yes ]; then
    state
    return
  fi
  while true; do
    now="$(state)" || now=''
    case "$now" in
      ACTIVE | READY) return ;;
      FAILED | SUSPENDED | PREEMPTED | TERMINATED)
        refuse "$NAME is $now; see why with '$(quoted "${tpu[@]}" describe "$NAME" "${where[@]}")', then resume"
        ;;
    esac
    echo "$(date +%T) $NAME: ${now:-no answer}"
    sleep 30
  done
}

delete() {
  local flags=(--quiet)
  [ "$QUEUED" = no ] || flags+=(--force) # deletes its slices too
  run "${tpu[@]}" delete "$NAME" "${where[@]}" "${flags[@]}"
}

on_all() {
  run "${tpu[@]}" ssh "$NAME" "${where[@]}" ${route[@]+"${route[@]}"} "${all[@]}" "--command=$1"
}

install() {
  local url
  url="$(quoted "${ARCHIVES%/}/$commit.tar.gz")"
  warn_of_changes
  need_program gcloud
  run_line "git archive --format=tar.gz $commit | gcloud storage cp - $url"
  # The glob spares the virtual environment, .venv.
  on_all "{ test ! -e emu_jax/launch/worker.sh || emu_jax/launch/worker.sh stop; } && mkdir -p emu_jax \
&& rm -rf emu_jax/* && gcloud storage cp $url emu_jax.tar.gz && tar -xzf emu_jax.tar.gz -C emu_jax \
&& ${environment}emu_jax/launch/worker.sh install $extras"
}

# A rebooted worker has lost its mount.
start() {
  on_all "${MOUNT:+{ $MOUNT; \} && }${environment}emu_jax/launch/worker.sh start $(quoted "${job[@]}")"
}

stop() {
  on_all "emu_jax/launch/worker.sh stop"
}

resume() {
  local now=SUSPENDED # --dry-run prints the longest path
  if [ "$dry_run" = yes ]; then state; else now="$(state 2> /dev/null)" || now=''; fi
  if [[ "$now" =~ ^(ACTIVE|READY)$ ]]; then
    stop
    start
    return
  fi
  if [[ "$now" =~ ^(FAILED|SUSPENDED|PREEMPTED|TERMINATED)$ ]]; then
    delete
    now=''
  fi
  if [ -z "$now" ]; then create; else await; fi
  install
  start
}

status() {
  state
  on_all "emu_jax/launch/worker.sh status"
}

logs() {
  run "${tpu[@]}" ssh "$NAME" "${where[@]}" ${route[@]+"${route[@]}"} "${first[@]}" \
    "--command=emu_jax/launch/worker.sh log"
}

case "$command" in
  run) start ;;
  *) "$command" ;;
esac
