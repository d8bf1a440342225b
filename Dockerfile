# For a machine with an NVIDIA GPU and the NVIDIA container toolkit:
#     docker build -t flashcore .
#     docker run --rm --gpus all flashcore                what it finds, and one kernel checked
#     docker run --rm --gpus all -it flashcore python     import flashcore_hf
# Without a GPU, in Triton's interpreter: --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
#
# Python's image and not one with CUDA: PyTorch's wheels bring the libraries of CUDA, and Triton an assembler.
FROM python:3.12-slim

# Triton compiles a little C for each kernel that it launches.
RUN apt-get update && \
    apt-get install --yes --no-install-recommends gcc libc6-dev && \
    rm -rf /var/lib/apt/lists/*

RUN useradd --create-home flashcore
USER flashcore
WORKDIR /home/flashcore
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1
RUN python -m venv env
ENV PATH=/home/flashcore/env/bin:$PATH

# PyTorch chooses its Triton: the one in constraints.txt is for tests on the CPU build.
COPY --chown=flashcore constraints.txt ./
RUN grep -v '^triton=' constraints.txt > versions.txt && \
    python -m pip install torch -c versions.txt

COPY --chown=flashcore pyproject.toml README.md LICENSE source/
COPY --chown=flashcore flashcore_hf source/flashcore_hf
COPY --chown=flashcore kernels source/kernels
RUN python -m pip install ./source -c versions.txt && rm -r source
COPY --chown=flashcore examples examples

CMD ["python", "-m", "flashcore_hf", "env"]
