# mftctl at its tested versions. CPU:
#   docker build -t mftctl . && docker run --rm -v "$PWD:/work" mftctl run quickstart
# NVIDIA GPUs:
#   docker build -t mftctl --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg TORCH_INDEX= .
#   docker run --rm --gpus all -v "$PWD:/work" mftctl run quickstart
ARG BASE=python:3.12-slim
FROM ${BASE}

# The index of torch's CPU wheels; empty takes those of PyPI, which include CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

RUN command -v python3 >/dev/null && python3 -c "import ensurepip, venv" || \
    { apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*; }

COPY . /opt/src
RUN python3 -m venv /opt/mftctl && \
    /opt/mftctl/bin/pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        -c /opt/src/constraints.txt /opt/src && \
    rm -rf /opt/src

ENV PATH=/opt/mftctl/bin:$PATH HF_HOME=/work/.cache/huggingface MFTCTL_CACHE=/work/.cache/mftctl
WORKDIR /work
ENTRYPOINT ["mftctl"]
CMD ["--help"]
