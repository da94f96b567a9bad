# One image for every service; the command says which:
#   python -m deltawire_relay | python -m deltawire_worker | python -m deltawire.gateway
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# The lock is complete and all wheels: nothing is compiled here, and no hash is skipped.
COPY requirements/ requirements/
RUN python -m venv --without-pip /opt/deltawire \
 && pip --python /opt/deltawire install --require-hashes --only-binary=:all: -r requirements/all.txt
# pip would fetch the build backend unpinned; this takes it, hashes and all, out of the development lock.
RUN awk '/^[^ #]/ { keep = /^(hatchling|packaging|pathspec|pluggy|tomlkit|trove-classifiers)==/ } keep' requirements/dev.txt > build.txt \
 && pip install --require-hashes --only-binary=:all: -r build.txt
COPY pyproject.toml README.md LICENSE ./
COPY core/ core/
COPY worker/ worker/
COPY relay/ relay/
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
 && pip --python /opt/deltawire install --no-deps --no-index /dist/*.whl
# What the lock misses fails here, not at the first job: kombu loads its transports late.
RUN /opt/deltawire/bin/python -c "import kombu.transport.redis, deltawire_relay.server, deltawire_worker.app, deltawire.gateway.server"

FROM python:${PYTHON_VERSION}-slim-bookworm
# A fixed uid, so that Kubernetes' runAsNonRoot and the owners of mounted secrets can name it.
RUN groupadd --gid 10001 deltawire \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin deltawire
# Owned by root and compiled beforehand: the services write nothing, so the root may be read-only.
COPY --from=build /opt/deltawire /opt/deltawire
ENV PATH=/opt/deltawire/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /
EXPOSE 8080 8081
# Relay: goodbye, then close. Worker: takes no more jobs, lets streams finish for DELTAWIRE_SHUTDOWN_GRACE_S.
STOPSIGNAL SIGTERM
CMD ["python", "-m", "deltawire_relay"]
