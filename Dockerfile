# The command molf, with the versions that the tests run with. On a CPU:
#   docker build -t molf . && docker run --rm -v "$PWD:/runs" molf train --output_dir /runs/out
# On a CUDA GPU:
#   docker build -t molf --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 \
#     --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#   docker run --rm --gpus all -v "$PWD:/runs" molf train ...
ARG BASE=python:3.11-slim
# hadolint ignore=DL3006
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# CUDA images have no Python. Kernels of triton are compiled on the machine, with Python's headers.
# hadolint ignore=DL3008
RUN if ! command -v python3; then \
      apt-get update \
      && apt-get install -y --no-install-recommends gcc python3 python3-dev python3-venv \
      && rm -rf /var/lib/apt/lists/*; \
    fi \
    && python3 -m venv /opt/molf
ENV PATH=/opt/molf/bin:$PATH
WORKDIR /source
COPY pyproject.toml README.md LICENSE requirements-dev.lock ./
COPY src src
RUN pip install --extra-index-url "$TORCH_INDEX" --constraint requirements-dev.lock '.[train,sql]'
RUN useradd --create-home --uid 1001 molf && mkdir /runs && chown molf /runs
USER 1001
WORKDIR /runs
ENTRYPOINT ["molf"]
CMD ["--help"]
