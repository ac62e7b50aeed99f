# hiar on NVIDIA GPUs, with the CUDA extension built for sm_80 to sm_120. From the repository's root; the host needs the
# NVIDIA container toolkit and a driver for CUDA 13:
#
#     docker build -f docker/cuda.Dockerfile -t hiar:cuda .
#     docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/work" hiar:cuda doctor
#
# torch's wheels bring the CUDA libraries that they call: the toolkit is needed only to build. --ipc host lets the
# processes of a pipeline share memory.

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/hiar
ENV PATH=/opt/hiar/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY LICENSE MANIFEST.in README.md pyproject.toml setup.py ./
COPY csrc ./csrc
COPY hiar_kernels ./hiar_kernels
COPY hiar_model ./hiar_model
RUN HIAR_BUILD_CUDA=1 pip install --no-cache-dir -c constraints.txt '.[wan]'

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# Triton compiles its launchers where it runs: gcc and the headers of Python and C stay. Ubuntu keeps no old versions
# that could be pinned.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/hiar /opt/hiar
# Any --user may write to these, and no library asks the system for the user's name.
ENV PATH=/opt/hiar/bin:$PATH HOME=/tmp USER=hiar
USER 10001
WORKDIR /work
ENTRYPOINT ["hiar"]
CMD ["--help"]
