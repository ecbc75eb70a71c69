# An image with the environment and the project. Running it needs no network; the build downloads everything.
#   docker build -t vit .                            for CPUs
#   docker build -t vit --build-arg CUDA=13 .        for NVIDIA GPUs with a driver of CUDA 13 (also: 12, 11)
#   docker run --rm --network none vit ./launch_local_train.sh --preset cpu-quick --dataset shapes
# docs/docker.md says how to mount datasets and run folders.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

# g++ and the headers of Python are for torch.compile, Triton and DeepSpeed, which build operations when first used;
# git is for the commit in run.json.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /project

# The packages are a layer of their own, made again only when their pins change. The CUDA libraries come with them, so
# the base image has none. CPU_INDEX may name an index of CPU builds of PyTorch, which have no CUDA libraries.
WORKDIR /project
ARG CUDA=none
ARG CPU_INDEX=
# A start also takes the packages of the image, whatever CUDA version the driver has.
ENV DRIVER_CUDA=$CUDA
COPY requirements.txt ./
COPY environment/ environment/
RUN if [ "$CUDA" = none ] && [ -n "$CPU_INDEX" ]; then export PIP_EXTRA_INDEX_URL="$CPU_INDEX"; fi; \
    PIP_NO_CACHE_DIR=1 INSTALLER=pip PYTHON=python3 environment/setup.sh

COPY . ./
# A start with `docker run --user` may write to these folders and to the home folder, and finds a user name.
RUN mkdir -p data runs results .torch_extensions /home/user \
    && chmod a+rwX data runs results .torch_extensions /home/user
ENV PATH=/project/.venv/bin:$PATH PYTHON=/project/.venv/bin/python TORCH_EXTENSIONS_DIR=/project/.torch_extensions \
    HOME=/home/user USER=user HF_HUB_OFFLINE=1
CMD ["./launch_local_train.sh"]
