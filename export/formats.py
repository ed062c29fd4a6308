"""Every format that `optim export` writes. Adding one is a file here and one row."""

from optim.export.compressed_tensors import CompressedTensors
from optim.export.exporter import Exporter
from optim.export.gguf.exporter import Gguf
from optim.export.mlx import Mlx
from optim.export.safetensors import Safetensors
from optim.export.words import AwqWords, GptqWords

FORMATS: dict[str, Exporter] = {
    "gguf": Gguf(),
    "safetensors": Safetensors(),
    "awq": AwqWords(),
    "gptq": GptqWords(),
    "mlx": Mlx(),
    "compressed-tensors": CompressedTensors(),
}
