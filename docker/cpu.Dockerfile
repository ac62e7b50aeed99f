# hiar on a machine without a GPU. From the repository's root:
#
#     docker build -f docker/cpu.Dockerfile -t hiar .
#     docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" hiar generate "a red circle moving right" -o circle.mp4
#
# --build-arg TORCH_INDEX=ADDRESS takes torch's small CPU build from the address that PyTorch's start page gives; without
# it torch brings all of CUDA along, 5.6 GB.

FROM python:3.12.11-slim-bookworm AS build
ARG TORCH_INDEX=
RUN python -m venv /opt/hiar
ENV PATH=/opt/hiar/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY LICENSE MANIFEST.in README.md pyproject.toml setup.py ./
COPY csrc ./csrc
COPY hiar_kernels ./hiar_kernels
COPY hiar_model ./hiar_model
RUN HIAR_BUILD_CUDA=0 pip install --no-cache-dir -c constraints.txt .

FROM python:3.12.11-slim-bookworm
COPY --from=build /opt/hiar /opt/hiar
# Any --user may write to these, and no library asks the system for the user's name.
ENV PATH=/opt/hiar/bin:$PATH HOME=/tmp USER=hiar
USER 10001
WORKDIR /work
ENTRYPOINT ["hiar"]
CMD ["--help"]
