#!/usr/bin/env bash
# A new operator's path, from a clone to the first token of an adapter of one's own: the commands of
# docs/operations.md, timed. CI runs it. It leaves nothing behind but the virtual environment.
#   deploy/first_token.sh              installs into .venv, if that isn't done yet
#   VENV=/path deploy/first_token.sh   takes that environment as it is
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }

step "install"
[[ -n ${VENV:-} ]] || make install </dev/null
bin=${VENV:-.venv}/bin
data=$(mktemp -d)
service=
finish() {
  status=$?
  if [[ -n $service ]]; then
    kill -TERM "$service" 2>/dev/null || true
    wait "$service" || true
  fi
  if ((status)) && [[ -f $data/up.log ]]; then cat "$data/up.log" >&2; fi
  rm -rf "$data"
  exit "$status"
}
trap finish EXIT
value() { "$bin/python" -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$@"; }

step "start the service: loraplex up"
"$bin/python" -m loraplex.cluster.cli up --port 0 --data-dir "$data/lrpx" --demo-dir deploy/demo \
  --groups 1 >"$data/up.log" 2>&1 </dev/null &
service=$!
facts=$data/lrpx/demo.json
until [[ -f $facts ]]; do
  kill -0 "$service" 2>/dev/null || { echo "error: the service ended" >&2; exit 1; }
  ((SECONDS < 600)) || { echo "error: the service isn't ready after 600 s" >&2; exit 1; }
  sleep 0.2
done
export LORAPLEX_URL LORAPLEX_KEY
LORAPLEX_URL=$(value "$facts" url)
loraplex() { "$bin/python" -m loraplex.cluster.cli "$@"; }

step "make a tenant: loraplex tenants create"
LORAPLEX_KEY=$(value "$facts" admin_key)
made=$(loraplex tenants create newcomer)
LORAPLEX_KEY=$(awk '$1 == "key" { print $2 }' <<<"$made")

step "make an adapter, push it: loraplex adapters push"
"$bin/python" deploy/own_adapter.py "$data/my-style"
loraplex adapters push "$data/my-style"

step "ask it, and the base model"
"$bin/python" - <<'PY'
import json, os, time, urllib.request

opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(model):
    body = {"model": model, "prompt": "In the beginning", "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        os.environ["LORAPLEX_URL"] + "/v1/completions",
        json.dumps(body).encode(),
        {"authorization": "Bearer " + os.environ["LORAPLEX_KEY"], "content-type": "application/json"},
    )
    started = time.monotonic()
    with opener.open(request, timeout=60) as answer:
        text = json.load(answer)["choices"][0]["text"]
    print(f"{model} ({time.monotonic() - started:.2f} s): {text!r}")
    return text


assert ask("my-style") != ask("loraplex-demo"), "the adapter changes nothing"
PY
printf '\nfirst token of an own adapter after %s s\n' "$SECONDS"
