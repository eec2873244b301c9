"""Packaging. Ranges are for users; the pins that the tests run with are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRED = [
    "torch>=2.6",  # models, losses, torch.distributed
    "torchvision>=0.21",  # timm imports it
    "timm>=1.0.15",  # pretrained vision transformers
    "deepspeed>=0.19,<0.20",  # the training engine; we read private fields of it, tried with 0.19
    "ray[default]>=2.44",  # places, watches and restarts workers; [default]: `ray job submit`
    "webdataset>=0.2.100",  # the shard format's own reader and writer: tests hold our index and tars against it
    "numpy>=1.26",
    "pillow>=10.1",  # decodes all but plain JPEG files, and judges those that the fast decoder complains of
    "simplejpeg>=1.8",  # decodes plain JPEG files: the pixels of Pillow, faster, and at a smaller scale where that does
    "pydantic>=2.6",  # config: unknown keys refused, values checked
    "pyyaml>=6.0",
    "safetensors>=0.4.3",  # weights without pickle
    "fsspec>=2024.6",  # remote shards: one interface to all stores (torch needs it as well)
    "aiohttp>=3.9",  # fsspec's http(s) (ray[default] needs it as well)
    "huggingface-hub>=0.23",  # where timm's weights are cached: asked before a download is tried
]
EXTRAS = {
    "cpu": ["faiss-cpu>=1.9"],  # nearest-neighbour search; exactly one of cpu and gpu
    "gpu": ["faiss-gpu>=1.9"],
    "benchmarks": ["scipy>=1.11"],  # make_shards --benchmark: the annotations of Cars and Flowers are MATLAB files
    "s3": ["s3fs>=2024.6"],  # s3://; brings botocore, which few need, hence an extra
    "gs": ["gcsfs>=2024.6"],  # gs://
    "dev": [
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "hypothesis>=6.100",
        "pytorch-metric-learning>=2.5",  # judge of the metrics
        "tensorboard>=2.15",  # reads back the event files that a job writes
        "s3fs>=2024.6",
        "moto[s3]>=5.0",  # an S3 protocol server for the tests, as a process on loopback
        "flask>=2.3",  # what that server runs in; moto[server] would bring all of AWS
        "flask-cors>=4.0",
        "ruff>=0.9",
        "mypy>=1.14",
        "types-PyYAML",
        "scipy>=1.11",  # as in benchmarks
        # its interpreter runs the GPU kernel's tests; not pinned, since torch for GPUs brings the one that suits it
        "triton>=3.2; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "kubernetes-validate>=1.33",  # schemas of Kubernetes, which cluster/kubernetes is held to; brings jsonschema
    ],
}

setup(
    name="grappa-dist",
    version="0.1.0",
    description="One image-retrieval model for many tasks, adapted from a frozen ViT with unlabelled images, at scale",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["grappa_dist", "grappa_dist.*"]),
    package_data={"grappa_dist": ["py.typed"], "grappa_dist.demo": ["*.safetensors"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
