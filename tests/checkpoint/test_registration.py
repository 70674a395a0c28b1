"""Each in a process of its own: what is imported when."""

import subprocess
import sys

import pytest

BOTH = "auto.AUTO_QUANTIZER_MAPPING['compress'], auto.AUTO_QUANTIZATION_CONFIG_MAPPING['compress']"


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_import_compress_is_light():
    run(
        "import sys, compress\n"
        "assert not {'torch', 'transformers', 'pydantic', 'numpy'} & sys.modules.keys()\n"
        "assert {'run', 'plan', 'load', 'evaluate', '__version__'} <= set(dir(compress))\n"
        "assert compress.load.__module__ == 'compress.checkpoint.load'\n"
        "import pytest\n"
        "with pytest.raises(AttributeError, match='nothing'): compress.nothing"
    )


@pytest.mark.parametrize(
    "order",
    ["import compress, transformers", "import transformers, compress", "import transformers.quantizers, compress",
     "import compress, importlib; importlib.reload(compress); import transformers"],
)  # fmt: skip
def test_registered_once_in_any_order(order):
    run(
        f"import sys; {order}\n"
        "from transformers.quantizers import auto\n"
        f"names = [c.__name__ for c in ({BOTH})]\n"
        "assert names == ['CompressQuantizer', 'CompressConfig'], names\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['compressed-tensors'].__module__.startswith('transformers.')\n"
        "assert sum(getattr(f, 'compress_llm', False) for f in sys.meta_path) == 1"
    )


def test_survives_reloading_either_side():
    run(
        "import importlib, compress\n"
        "from transformers.quantizers import auto\n"
        "importlib.reload(compress)\n"
        "importlib.reload(auto)\n"
        f"{BOTH}"
    )
