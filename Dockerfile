# keepset for a GPU machine: `docker build -t keepset .`, then
# `docker run --gpus all -v "$PWD:/work" keepset run recipe.yaml`. pip's torch for Linux brings CUDA with it.
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir -c constraints.txt torch '.[train,plots]'
WORKDIR /work
ENTRYPOINT ["keepset"]
CMD ["--help"]
