#!/usr/bin/env bash
# `make test-containers`: build the images, bring up a swarm in containers, harm it, and see that it recovers.
#
# The engine that answers is used. Where none does, root on Debian gets one from Debian's packages for the time of the
# test; anywhere else the tests are skipped, with the reason. Images that no registry gives are made from Debian's
# packages too, under the same names. With KEEP_ENGINE=1 an engine started here goes on running, and is used next time.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
PLACE=${CONTAINERS_DIR:-${TMPDIR:-/tmp}/braniac-containers}
BASE=python:3.11-slim-bookworm
PROMETHEUS=$(sed -n 's/^ *image: \(prom\/prometheus:.*\)$/\1/p' deploy/compose.yaml)
NODE=$(sed -n 's/^ *image: \(braniac-node:.*\)$/\1/p' deploy/compose.yaml | head -1)
FAULTS=$(sed -n 's/^ *image: \(braniac-faults:.*\)$/\1/p' deploy/compose.chaos.yaml)

skip() {
    echo "container tests skipped: $1"
    exit 0
}

say() { echo "== $*" >&2; }

mirror() { apt-get indextargets --format '$(SITE)' | grep -v security | sort -u | head -1; }

# Docker Engine 26 and Compose 2.26 out of trixie, unpacked aside, with bookworm's runc, whose libc is the one here.
fetch_engine() {
    [ -e "$PLACE/config/cli-plugins/docker-compose" ] && return
    say "fetching a Docker engine from Debian's packages"
    mkdir -p "$PLACE"/{apt/lists/partial,apt/archives/partial,packages,root,config/cli-plugins}
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        docker.io iptables mmdebstrap prometheus >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror) trixie main" >"$PLACE/apt/trixie.list"
    local aside=(-oDir::State::Lists="$PLACE/apt/lists" -oDir::Etc::SourceList="$PLACE/apt/trixie.list"
        -oDir::Etc::SourceParts=/dev/null -oDir::Cache="$PLACE/apt" -oAPT::Sandbox::User=root)
    apt-get "${aside[@]}" update -qq
    (cd "$PLACE/packages" && apt-get "${aside[@]}" -qq download docker.io docker-cli containerd docker-compose docker-buildx)
    for package in "$PLACE"/packages/*.deb; do dpkg -x "$package" "$PLACE/root"; done
    cp "$PLACE"/root/usr/libexec/docker/cli-plugins/* "$PLACE/config/cli-plugins/"
}

start_engine() {
    export DOCKER_HOST=unix://$PLACE/docker.sock DOCKER_CONFIG=$PLACE/config
    docker version >/dev/null 2>&1 && return
    say "starting a Docker engine in $PLACE"
    # --iptables=false: the host's own tables stay as they are; the swarm's network needs no way out.
    PATH="$PLACE/root/usr/sbin:$PLACE/root/usr/bin:$PATH" setsid nohup dockerd --data-root "$PLACE/data" \
        --exec-root "$PLACE/exec" -H "$DOCKER_HOST" --pidfile "$PLACE/dockerd.pid" \
        --iptables=false --ip6tables=false --ip-forward=false >"$PLACE/dockerd.log" 2>&1 </dev/null &
    for _ in $(seq 150); do docker version >/dev/null 2>&1 && return; sleep 0.2; done
    skip "the Docker engine does not start: $(tail -1 "$PLACE/dockerd.log")"
}

stop_engine() {
    [ -n "${KEEP_ENGINE:-}" ] && return
    [ -e "$PLACE/dockerd.pid" ] || return 0
    local pid
    pid=$(cat "$PLACE/dockerd.pid")
    kill "$pid" 2>/dev/null || return 0
    while kill -0 "$pid" 2>/dev/null; do sleep 0.2; done
    ip link delete docker0 2>/dev/null || true
}

have() { docker image inspect "$1" >/dev/null 2>&1 || timeout 60 docker pull --quiet "$1" >/dev/null 2>&1; }

base_image() {
    have "$BASE" && return
    command -v mmdebstrap >/dev/null || skip "no registry gives $BASE, and mmdebstrap is not there to make it"
    say "making $BASE from Debian's packages"
    mmdebstrap --mode=root --variant=minbase \
        --include=python3,python3-venv,python3-pip,python-is-python3,ca-certificates,iproute2,iptables \
        --customize-hook='rm -f "$1"/usr/lib/python3.11/EXTERNALLY-MANAGED' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        bookworm - "$(mirror)" 2>"$PLACE/mmdebstrap.log" | docker import --change 'CMD ["python3"]' - "$BASE" >/dev/null
}

node_images() {
    say "building $NODE from wheels, without a network"
    local torch wheel=("$PYTHON" -m pip wheel --quiet --wheel-dir "$PLACE/wheels")
    torch=$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)+cpu
    "${wheel[@]}" "$torch" 2>/dev/null || "${wheel[@]}" --index-url https://download.pytorch.org/whl/cpu "$torch"
    "${wheel[@]}" "$torch" 'setuptools>=77' .
    docker build --quiet --target node --build-context wheels="$PLACE/wheels" --build-arg PIP_NO_INDEX=1 \
        --network none -t "$NODE" . >/dev/null
    docker build --quiet --target faults --network none -t "$FAULTS" . >/dev/null
    docker image inspect --format '{{.Size}}' "$NODE" | awk -v name="$NODE" '{printf "%s: %.0f MB\n", name, $1 / 1e6}'
}

prometheus_image() {
    have "$PROMETHEUS" && return
    command -v prometheus >/dev/null || skip "no registry gives $PROMETHEUS, and prometheus is not installed"
    say "making $PROMETHEUS from the prometheus that is installed: $(prometheus --version 2>&1 | head -1)"
    mkdir -p "$PLACE/prometheus"
    cp "$(command -v prometheus)" "$PLACE/prometheus/"
    docker build --quiet --network none -t "$PROMETHEUS" -f - "$PLACE/prometheus" >/dev/null <<END
FROM $BASE
COPY prometheus /bin/prometheus
RUN install -d -o 65534 -g 65534 /prometheus
USER 65534:65534
ENTRYPOINT ["/bin/prometheus"]
END
}

command -v docker >/dev/null || [ "$(id -u)" = 0 ] || skip "there is no docker command here"
mkdir -p "$PLACE"
if ! docker version >/dev/null 2>&1; then
    [ "$(id -u)" = 0 ] || skip "the Docker engine does not answer, and only root can start one"
    command -v apt-get >/dev/null || skip "the Docker engine does not answer, and there is no Debian to get one from"
    fetch_engine || skip "a Docker engine could not be fetched from Debian's packages"
    trap stop_engine EXIT
    start_engine
fi
docker compose version >/dev/null 2>&1 || skip "docker has no Compose plugin here"
base_image
node_images
prometheus_image
BRANIAC_CONTAINERS=1 "$PYTHON" -m pytest -v -rP tests/containers "$@"
