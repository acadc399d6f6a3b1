# MetaPerturb on a GPU. The image holds the packages; the two commands are the README's:
#
#   docker build -t metaperturb .
#   docker run --gpus all --ipc host -v "$PWD/data:/metaperturb/data" -v "$PWD/runs:/metaperturb/runs" metaperturb src
#   docker run --gpus all --ipc host -v "$PWD/data:/metaperturb/data" -v "$PWD/runs:/metaperturb/runs" metaperturb tgt 0
#
# PyTorch's wheels bring CUDA along, so that a plain Python image does; the host provides the driver.
FROM python:3.12-slim

# git: results name the commit that made them; g++: the kernel for CPUs, compiled on first use
RUN apt-get update && apt-get install --yes --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /metaperturb
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . .

# Kernels are compiled once and kept beside the data.
ENV VENV=none PYTHON=python XDG_CACHE_HOME=/metaperturb/data/compiled \
    TORCHINDUCTOR_CACHE_DIR=/metaperturb/data/compiled/inductor
ENTRYPOINT ["./run.sh"]
CMD ["help"]
