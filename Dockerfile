# ledgerline with everything it starts: the binary, the dbt project, and the Python environment that runs dbt.
#   docker build --tag ledgerline .

FROM rust:1.95.0-bookworm AS build
# Cargo features to switch on, separated by commas.
ARG FEATURES="snowflake,tls"
# TLS is Debian's, on both sides: its fixes come with the base image.
ENV OPENSSL_NO_VENDOR=1
WORKDIR /src
COPY . .
# Downloads and compiled dependencies stay in the builder's cache; only the binary becomes a layer.
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --features "$FEATURES" \
    && install -D target/release/ledgerline /out/ledgerline

FROM debian:12.13-slim AS base
# Debian's own updates are wanted: a security fix must not wait for a version written here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates libssl3 python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --user-group --home-dir /var/lib/ledgerline ledgerline \
    && install -d -m 0700 -o ledgerline -g ledgerline /var/lib/ledgerline
WORKDIR /opt/ledgerline
# The Python environment lies in the cache directory; the data dir is the only place that is written to.
ENV XDG_CACHE_HOME=/opt/ledgerline/cache LEDGERLINE__DATA_DIR=/var/lib/ledgerline PYTHONDONTWRITEBYTECODE=1
COPY --from=build /out/ledgerline /usr/local/bin/ledgerline
COPY config.toml ./
COPY dbt dbt

FROM base AS environment
RUN install -d -o ledgerline -g ledgerline cache
USER 10001:10001
# The binary fills its environment by itself, from its own lock file and hashes: asked for the DAGs it needs its state
# database, so this also proves that binary, Python and PostgreSQL run on this base, without root.
RUN ledgerline dag list --data-dir /tmp/probe && rm -rf /tmp/probe

FROM base
COPY --from=environment /opt/ledgerline/cache cache
USER 10001:10001
VOLUME /var/lib/ledgerline
# Healthy: the pipeline answers on its control socket, and its state database answers too.
HEALTHCHECK --interval=15s --timeout=10s --start-period=60s --retries=4 CMD ["ledgerline", "dag", "list", "--json"]
ENTRYPOINT ["ledgerline"]
CMD ["run", "--no-tui"]
