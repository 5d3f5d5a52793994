# minitron in a container:  docker build -t minitron .  &&  docker run --gpus all -v "$PWD:/work" minitron compress experiment=…
#
#   BASE_IMAGE     an image with apt and, for the fused kernels, nvcc; a torch that its python3 has is kept
#   RUNTIME_IMAGE  of the final stage, of the same distribution; give BASE_IMAGE's where that brings its own torch
#   TORCH          requirement or wheel address, where the base has no torch
#   FLASH_ATTN     1: builds flash-attn too (takes long)
ARG BASE_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04
# Without compiler and libraries of CUDA, 7 GB less: torch's wheels bring their own, and the kernels are built in the stage before.
ARG RUNTIME_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04

FROM ${BASE_IMAGE} AS build
ARG TORCH="torch>=2.11"
ARG FLASH_ATTN=0
ARG DEBIAN_FRONTEND=noninteractive
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Versions are those of the base image's distribution.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/minitron/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# --system-site-packages and the constraint: the torch of the base image is used and not replaced.
# hadolint ignore=DL3013
RUN python3 -m venv --system-site-packages /opt/minitron/venv \
    && pip install "pip>=25" "setuptools>=77" "wheel>=0.45" \
    && { python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > /opt/minitron/keep.txt 2> /dev/null \
        || pip install "${TORCH}" \
        && python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > /opt/minitron/keep.txt; }
# The dependencies alone first: this layer stays cached while the sources change.
WORKDIR /opt/minitron/source
COPY setup.py pyproject.toml LICENSE ./
COPY minitron/__init__.py minitron/__init__.py
RUN mkdir conf kernels \
    && pip install --no-build-isolation --constraint /opt/minitron/keep.txt ".[gguf,evaluate]" \
    && if [ "${FLASH_ATTN}" = 1 ]; then pip install --no-build-isolation --constraint /opt/minitron/keep.txt flash-attn; fi
COPY . .
RUN pip install --no-build-isolation --no-deps --force-reinstall . \
    && mkdir -p /opt/minitron/launch /opt/minitron/kernels \
    && { python -m minitron.ops.build --out /opt/minitron/kernels || true; } \
    && { ! command -v nvcc > /dev/null || test -n "$(find /opt/minitron/kernels -name '*-cuda-*.so')"; } \
    && cp launch/run.py launch/environment.sh launch/torchrun.sh launch/deepspeed.sh /opt/minitron/launch/

FROM ${RUNTIME_IMAGE}
ARG DEBIAN_FRONTEND=noninteractive
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential ca-certificates openssh-client pdsh python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /bin/bash minitron \
    && mkdir /work \
    && chown 10001 /work
COPY --from=build /opt/minitron/venv /opt/minitron/venv
COPY --from=build /opt/minitron/launch /opt/minitron/launch
COPY --from=build /opt/minitron/kernels /opt/minitron/kernels
ENV PATH=/opt/minitron/venv/bin:$PATH PYTHONUNBUFFERED=1 MINITRON_KERNELS=/opt/minitron/kernels
USER 10001
WORKDIR /work
HEALTHCHECK --interval=5m --timeout=60s CMD ["minitron", "--version"]
# Several processes:  docker run --entrypoint bash … /opt/minitron/launch/torchrun.sh distill …
ENTRYPOINT ["minitron"]
CMD ["--help"]
