#!/usr/bin/env bash
# Makes the Secrets that the manifests name; those that are there already stay as they are.
#   deploy/kuberay/make_secrets.sh [NAMESPACE]
# S3 keys are taken from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; without them no Secret is made,
# and the pods use their own identity (workload-identity/).
set -euo pipefail
namespace=${1:-loraplex}
random() { head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n'; }

# Values go by files of this user alone: arguments can be read by others.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
make_secret() {
  local name=$1
  shift
  if kubectl -n "$namespace" get secret "$name" >/dev/null 2>&1; then
    echo "secret $name is there already"
    return
  fi
  local arguments=()
  while (($#)); do
    printf %s "$2" >"$folder/$1"
    arguments+=("--from-file=$1=$folder/$1")
    shift 2
  done
  kubectl -n "$namespace" create secret generic "$name" "${arguments[@]}"
}

kubectl get namespace "$namespace" >/dev/null 2>&1 || kubectl create namespace "$namespace"
make_secret loraplex-ray-token auth_token "$(random)"
make_secret loraplex-cluster LORAPLEX_CLUSTER_SECRET "$(random)" LORAPLEX_METRICS_TOKEN "$(random)"
make_secret loraplex-redis password "$(random)"
if [[ -n ${AWS_ACCESS_KEY_ID:-} && -n ${AWS_SECRET_ACCESS_KEY:-} ]]; then
  make_secret loraplex-s3 LORAPLEX_STORE_ACCESS_KEY "$AWS_ACCESS_KEY_ID" \
    LORAPLEX_STORE_SECRET_KEY "$AWS_SECRET_ACCESS_KEY"
fi
