# The image of one node: `docker build -t braniac-node:0.1.0 .`, then `docker run --init -v braniac:/var/lib/braniac braniac-node:0.1.0`.
# deploy/README.md has the rest, a swarm in containers included. No `# syntax=` line: the frontend would be fetched from a registry.

# Wheels for a machine without a package index: `--build-context wheels=DIR` puts a folder in the place of this empty stage.
FROM scratch AS wheels

FROM python:3.11-slim-bookworm AS build
# The CPU build of torch: the one on PyPI brings gigabytes of CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# 1: install from the wheels alone.
ARG PIP_NO_INDEX=0
ENV PIP_FIND_LINKS=/wheels PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
RUN python -m venv --without-pip /opt/braniac
# torch is a layer of its own, made again only when pyproject.toml changes. pip compiles what it installs, and must: in a
# root that cannot be written, every start would compile all of it anew. Its headers and tests are 195 MB nobody needs here.
COPY pyproject.toml ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    pip --python /opt/braniac/bin/python install --index-url "$TORCH_INDEX" \
    "$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)" \
    && cd /opt/braniac/lib/python3*/site-packages/torch && rm -r include test \
    && find bin -type f ! -name torch_shm_manager -delete
COPY README.md LICENSE ./
COPY protocol protocol
COPY model model
COPY node node
RUN --mount=type=bind,from=wheels,target=/wheels pip --python /opt/braniac/bin/python install .

# Not part of a node: `braniac-node swarm --engine docker` runs it in the network of a node to cap, lose and cut traffic.
FROM python:3.11-slim-bookworm AS faults
RUN command -v tc >/dev/null && command -v iptables >/dev/null || { apt-get update \
    && apt-get install -y --no-install-recommends iproute2 iptables && rm -rf /var/lib/apt/lists/*; }
ENTRYPOINT ["/bin/sh", "-c"]

FROM python:3.11-slim-bookworm AS node
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="braniac-node" \
      org.opencontainers.image.description="Train one language model on a swarm of volunteers' devices" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"
# A name for the user, because libraries look it up; folders that a volume put in their place takes its owner from.
RUN useradd --uid 10001 --no-create-home --home-dir /var/lib/braniac --shell /usr/sbin/nologin braniac \
    && install -d -o braniac -g braniac -m 0700 /var/lib/braniac \
    && install -d -o braniac -g braniac -m 0755 /run/braniac
COPY --from=build /opt/braniac /opt/braniac
ENV PATH=/opt/braniac/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    BRANIAC_NODE__state__dir=/var/lib/braniac \
    BRANIAC_NODE__data__cache_dir=/var/lib/braniac/cache \
    BRANIAC_NODE__network__listen=/ip4/0.0.0.0/tcp/4001
USER 10001:10001
VOLUME /var/lib/braniac
EXPOSE 4001/tcp
STOPSIGNAL SIGTERM
# Whether the daemon answers, and trains or rests; asking takes 0.4 s of processor time.
HEALTHCHECK --interval=30s --timeout=20s --start-period=120s --retries=3 \
    CMD ["braniac-node", "status", "--check"]
ENTRYPOINT ["braniac-node"]
CMD ["join"]
