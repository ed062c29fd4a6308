"""Every format that `optim export` writes. Adding one is a file here and one row."""

from optim.export.exporter import Exporter
from optim.export.safetensors import Safetensors

FORMATS: dict[str, Exporter] = {
    "safetensors": Safetensors(),
}
