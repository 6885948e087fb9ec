#!/usr/bin/env bash
# The real frameworks for the tests of the adapters, into the active environment, beside the `dev` extra: Detectron2,
# mmdet and transformers. Users need none of this: they bring the framework whose detectors they wrap.
set -euo pipefail
cd "$(dirname "$0")/../tests/adapters/frameworks"
# model_zoo of Detectron2 imports pkg_resources, which later versions no longer have.
python -m pip install --quiet "setuptools==80.10.2" wheel
python -m pip install --quiet --no-deps --no-build-isolation --require-hashes -r requirements.txt
site=$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
python -m pip install --quiet --no-deps --require-hashes --target "$site" \
    --python-version 3.10 --implementation cp --abi none --only-binary=:all: -r detectron2.txt
python -c 'import detectron2, mmengine, transformers; print("detectron2", detectron2.__version__, "mmengine", mmengine.__version__, "transformers", transformers.__version__)'
