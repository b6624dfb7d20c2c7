# The service alone, without pip or a compiler, for a read-only root file system and no capabilities:
# docs/operations/container.md. The base gets its security updates under one tag: build anew, with --pull.

FROM python:3.13-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /srv/agentcore-tools
RUN python -m venv --without-pip /opt/venv
COPY requirements/runtime.txt requirements/build.txt requirements/
# Wheels only: nothing is compiled, so neither stage needs a compiler.
RUN python -m pip --python /opt/venv/bin/python install --require-hashes --no-deps --no-compile \
        --only-binary :all: -r requirements/runtime.txt -r requirements/build.txt
# The command and the project's name and version. Of the package only its first file: a change of code changes the small
# layer of code alone. Editable: the package itself comes after it.
COPY pyproject.toml README.md ./
COPY app/__init__.py app/
COPY migrations/env.py migrations/
RUN python -m pip --python /opt/venv/bin/python install --no-deps --no-compile --no-build-isolation \
        --editable . \
    && python -m pip --python /opt/venv/bin/python uninstall --yes poetry-core \
    && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash /opt/venv/lib
COPY alembic.ini ./
COPY migrations migrations
COPY app app
# By hash and never checked: nothing can be written there at run time, and every start would compile anew.
RUN /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash app migrations \
    && rm -r requirements README.md

FROM python:3.13-slim-trixie
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="agentcore-tools" \
      org.opencontainers.image.description="Executes tools for AI agents: JSON-RPC over HTTP, validated, bounded, measured" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="python:3.13-slim-trixie"
# The number is what k8s/base/deployment.yaml runs as; no name, home or shell is needed for it. Volumes take over the owner.
RUN python -B -m pip uninstall --yes --root-user-action ignore pip \
    && rm -r "$(python -c 'import ensurepip; print(ensurepip.__path__[0])')" \
    && install -d -o 10001 -g 10001 -m 0750 /var/lib/agentcore
COPY --from=build /opt/venv /opt/venv
COPY --from=build /srv/agentcore-tools /srv/agentcore-tools
# The base has its modules uncompiled, and compiled they cannot be written at run time: those that a start imports are here.
RUN DATABASE_URL=sqlite+aiosqlite:////tmp/trial.db /opt/venv/bin/agentcore-tools migrate && rm /tmp/trial.db*
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    DATABASE_URL=sqlite+aiosqlite:////var/lib/agentcore/agentcore.db \
    JOURNAL_DIR=/var/lib/agentcore/journal
WORKDIR /srv/agentcore-tools
USER 10001:10001
VOLUME ["/var/lib/agentcore"]
EXPOSE 8001
# Alive, not ready: an engine that restarts what is unhealthy must not restart what waits for its database.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-I", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8001, timeout=4); c.request('GET', '/livez'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["agentcore-tools"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8001"]
