"""What a model that runs does without."""

import subprocess
import sys


def test_a_model_that_runs_reads_no_schema_and_no_package_of_others() -> None:
    code = "import sys, optim.cli.run; from optim.runtime.system.torch_import import import_torch; "
    code += "import_torch(); import optim.runtime.engine.load, optim.runtime.engine.session; "
    code += "print({'pydantic', 'gguf', 'yaml', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_torch_is_whole() -> None:
    code = "from optim.runtime.system.torch_import import import_torch; import_torch(); "
    code += "import torch; made = torch.Generator().manual_seed(1); "
    code += "print(torch.rand(3, generator=made).argsort().shape[0])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr
