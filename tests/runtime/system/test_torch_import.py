"""torch without what it knows of tensors that have no data, and how that comes back."""

import subprocess
import sys

BEGIN = (
    "import sys; from optim.runtime.system.torch_import import *; import_torch(); import torch; "
)


def ran(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_computes_needs_no_meta_registrations() -> None:
    code = "assert META not in sys.modules and 'torch._refs' not in sys.modules; "
    code += "print((torch.eye(2) @ torch.ones(2, 2)).softmax(-1).sum().item())"
    assert ran(code) == "2.0\n"


def test_the_meta_device_is_whole_once_it_is_asked_for() -> None:
    code = "import_meta(); q = torch.ones(1, 2, 3, 16, device='meta'); "
    code += "print(torch.nn.functional.scaled_dot_product_attention(q, q, q).shape[2])"
    assert ran(code) == "3\n"


def test_a_torch_that_is_there_stays_as_it_is() -> None:
    code = "import torch; before = torch._meta_registrations; "
    code += "from optim.runtime.system.torch_import import *; import_torch(); import_meta(); "
    code += "assert sys.modules[META] is before is torch._meta_registrations"
    done = subprocess.run([sys.executable, "-c", "import sys; " + code], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_model_that_runs_reads_no_schema_and_no_package_of_others() -> None:
    code = "import optim.cli.run, optim.runtime.engine.load, optim.runtime.engine.session; "
    code += "print({'pydantic', 'gguf', 'yaml', 'transformers'} & set(sys.modules))"
    assert ran(code) == "set()\n"
