"""A model that is open: its configuration, and tensors by name.

Only configuration and headers have been read; `read` fetches one tensor at a time, so nothing here
ever holds a model. Tensors are named as in transformers' modeling code (names.py).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from optim.recipes.errors import USAGE, OptimError
from optim.runtime.architecture.config import needs_remote_code, read_config, text_part
from optim.runtime.architecture.rope import ropes
from optim.runtime.architecture.settings import read_settings
from optim.runtime.architecture.shape import resolve
from optim.runtime.architecture.table import FAMILIES
from optim.runtime.formats import static_int
from optim.runtime.formats.pack_quantized import SchemeOf, parse_config
from optim.runtime.storage.companions import companions, copy_companions
from optim.runtime.storage.foreign.layouts import block_of
from optim.runtime.storage.gate import FIX, Stored, admit
from optim.runtime.storage.integers import IntegerStore
from optim.runtime.storage.lossless.store import LosslessStore
from optim.runtime.storage.names import canonical_parts, published_name
from optim.runtime.storage.tensors import Part, Store, TensorInfo
from optim.runtime.system.hashes import bytes_sha256, known_sha256
from optim.runtime.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SAMPLES = 64  # places at which a weight file's bytes enter the older fingerprint


@dataclass(slots=True)
class Checkpoint:
    """A model's configuration and tensors; `read` is lazy, everything else is in memory."""

    source: str
    name: str
    config: dict[str, Any]
    folder: Path
    """Where config, tokenizer and the other small files are."""
    store: Store
    trust_remote_code: bool = False
    gate: bool = True
    """Off: a model that is only looked at keeps what does not fit its configuration."""
    tensors: dict[str, TensorInfo] = field(init=False)
    left_out: tuple[str, ...] = field(init=False)
    """Stored tensors that are no part of the text model, such as a vision tower."""
    family: str = field(init=False)
    """transformers' `model_type` of the text model."""
    _parts: dict[str, Part] = field(init=False)
    _settings: Any = field(init=False, default=None, repr=False)
    _text: dict[str, Any] | None = field(init=False, default=None, repr=False)
    _hashes: dict[str, str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        named = text_part(self.config).get("model_type")
        self.family = named if isinstance(named, str) else str(self.settings.model_type)
        self._parts, self.left_out = canonical_parts(self.store.infos, self.config, self.family)
        self.tensors = {name: self._info(part) for name, part in self._parts.items()}
        if self.gate and self.family in FAMILIES and self.quantization_is_ours:
            self._pass_the_gate()
        elif self.gate and (self.quantization or {}).get("quant_method") == static_int.METHOD:
            known = ", ".join(sorted(FAMILIES))
            what = f"{self.source}: static integers of the family {self.family!r} are not known"
            raise OptimError(what, f"known families: {known}", USAGE)

    @property
    def quantization_is_ours(self) -> bool:
        """Whether tensors are stored in a form that is known here, or in none.

        Others can be looked at; what reads weights refuses them by name.
        """
        method = (self.quantization or {}).get("quant_method")
        return isinstance(self.store, IntegerStore) or method in (
            None,
            static_int.METHOD,
            "compressed-tensors",
        )

    def _pass_the_gate(self) -> None:
        """Keep what the configuration says the model consists of; see storage/gate.py."""
        facts = FAMILIES[self.family].decoder
        shape = resolve(self.settings, facts)
        ropes(self.settings, facts, shape.head_dim)  # rotary parameters that give angles
        table, head = f"{facts.embed}.weight", "lm_head.weight"
        if shape.tied and table not in self.tensors and head in self.tensors:
            for names in (self._parts, self.tensors):  # one tensor, stored under the other's name
                names[table] = names[head]  # type: ignore[assignment]
        static = static_int.read_config(self.quantization)
        if static is not None and max(static.prefix, default=0) >= shape.vocab:
            what = f"its prefix has the token {max(static.prefix)}, of {shape.vocab}"
            raise OptimError(f"{self.source} is damaged: {what}", FIX, USAGE)
        stored = Stored(self.source, self.tensors, self.read, schemes_of(self), static is not None)
        kept = admit(stored, shape, facts)
        self.left_out += tuple(self._parts[n].stored for n in self.tensors if n not in kept)
        self.tensors = {name: info for name, info in self.tensors.items() if name in kept}

    def _info(self, part: Part) -> TensorInfo:
        stored = self.store.infos[part.stored]
        count = part.span(stored.shape)[1]
        return TensorInfo(part.shape(stored.shape), stored.dtype, count * stored.dtype.itemsize)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """`quantization_config` of an already quantized model, else None."""
        return block_of(self.config)

    @property
    def settings(self) -> Any:
        """The values of transformers' configuration object of the text model, to be read only.

        Raises OptimError (2) for a model type that transformers does not know.
        """
        if self._settings is None:
            ours = not needs_remote_code(self.config)
            self._settings = read_settings(self.config, self.source) if ours else _read_remote(self)
        return self._settings

    @property
    def text_config(self) -> dict[str, Any]:
        """The text model's own configuration: `config` itself, unless it is a composed model.

        What that leaves to its class is filled in: alone, the class may fill in something else.
        """
        text = text_part(self.config)
        if text is self.config:
            return text
        if self._text is None:
            whole = self.hf_config().to_dict()
            whole.pop("transformers_version", None)
            self._text = whole | {k: v for k, v in text.items() if v is not None}
            self._text["tie_word_embeddings"] = whole.get("tie_word_embeddings", False)
        return self._text

    def read(self, name: str) -> Tensor:
        """One tensor by canonical name, on the CPU, in its own dtype.

        Raises OptimError (2) if there is no such tensor or its file is damaged.
        """
        if name not in self._parts:
            raise OptimError(
                f"{self.source} has no tensor {name}",
                "the weights may be incomplete, or of another family than config.json says",
                USAGE,
            )
        return self.store.read(self._parts[name])

    @property
    def layout(self) -> str | None:
        """`df11` or `bf12` of a model whose weights are packed without loss, else None."""
        return self.store.layout if isinstance(self.store, LosslessStore) else None

    def held(self, name: str) -> tuple[str, float] | None:
        """Format and bytes of a tensor that is stored otherwise than it is read; else None."""
        part = self._parts[name]
        held = self.store.held(part.stored)
        if held is None:
            return None
        share = self.tensors[name].nbytes / self.store.infos[part.stored].nbytes
        return held[0], held[1] * share

    def stored_name(self, name: str) -> str:
        """Name of a tensor in the files; empty for one that there is not."""
        return self._parts[name].stored if name in self._parts else ""

    def disk_name(self, canonical: str) -> str:
        """Name of a tensor in the family's published checkpoints (mixtral: `...w1.weight`)."""
        return published_name(canonical, self.family)

    def inputs(self) -> tuple[Path, ...]:
        """Where the model is: what an output is made from, and may not replace.

        Raises OptimError (2) for a file that would be copied and is a link out of there.
        """
        companions(self.folder, code=self.trust_remote_code)
        return (self.folder, *self.store.files)

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer and chat template."""
        trust = self.trust_remote_code
        made = load_tokenizer(self.folder, self.config, trust_remote_code=trust)
        rows = getattr(self.settings, "vocab_size", None)
        made.table = rows if isinstance(rows, int) else None
        static = static_int.read_config(self.quantization)
        if static is not None and made.begin:
            made.begun = static.prefix[: len(made.begin)] == made.begin
        return made

    def hf_config(self) -> "PretrainedConfig":
        """transformers' object for a model of its own, which may change it."""
        if needs_remote_code(self.config):
            return _read_remote(self)
        return read_config(self.config, self.source)

    def write_sidecars(self, folder: Path) -> None:
        """Copy what belongs with the weights (companions.py) into `folder`."""
        copy_companions(self.folder, folder, code=self.trust_remote_code)

    def fingerprint(self) -> str:
        """sha256 (hex) over config, names, shapes, dtypes and every byte of the weight files.

        Raises OptimError (2) for a file that changes while it is read.
        """
        files = (f"{name} {known}\n".encode() for name, known in self.file_hashes().items())
        return bytes_sha256(chain(self._outline(), files))

    def file_hashes(self) -> dict[str, str]:
        """sha256 (hex) of each weight file, by name; files are read once."""
        if not self._hashes:
            self._hashes.update({path.name: known_sha256(path) for path in self.store.files})
        return self._hashes

    def require_unchanged(self) -> None:
        """OptimError (2) if a weight file is no longer what `file_hashes` found, naming it."""
        for path in self.store.files:
            if self._hashes and known_sha256(path) != self._hashes[path.name]:
                message = f"{path} has changed while it was read: the result would be of two models"
                raise OptimError(message, "run the command again", USAGE)

    def sampled_fingerprint(self) -> str:
        """What side files made before the fingerprint covered every byte know a model by."""
        samples = chain.from_iterable(map(_sample, self.store.files))
        return bytes_sha256(chain(self._outline(), samples))

    def _outline(self) -> Iterator[bytes]:
        yield json.dumps(self.config, sort_keys=True).encode()
        for name, info in sorted(self.tensors.items()):
            line = f"{name} {info.shape} {info.dtype}\n"
            yield line.encode("utf-8", "surrogatepass")


def _sample(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield f"{path.name} {size}\n".encode()
    with path.open("rb") as file:
        for k in range(SAMPLES):
            file.seek((size - min(size, 4096)) * k // (SAMPLES - 1))
            yield file.read(4096)


def _read_remote(checkpoint: Checkpoint) -> "PretrainedConfig":
    """The configuration object of a model whose repository has the code of its class."""
    from transformers import AutoConfig, PretrainedConfig

    try:
        made: PretrainedConfig = AutoConfig.from_pretrained(
            checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code
        )
    except Exception as error:  # code of others raises what it wants
        raise OptimError(
            f"transformers cannot use the configuration of {checkpoint.source}: {error}",
            "check model_type in config.json, or install a newer transformers",
            USAGE,
        ) from None
    text: PretrainedConfig = made.get_text_config(decoder=True)
    return text


def schemes_of(checkpoint: Checkpoint) -> SchemeOf:
    """Canonical module name -> how it is packed; quantization_config has the published names."""
    store, config = checkpoint.store, checkpoint.quantization
    if isinstance(store, IntegerStore):
        stored = checkpoint.stored_name
        return lambda name: store.schemes.get(stored(f"{name}.weight_packed"))
    if not config or config.get("quant_method") == static_int.METHOD:
        return lambda _name: None
    scheme_of = parse_config(config)
    return lambda name: scheme_of(checkpoint.disk_name(f"{name}.weight").removesuffix(".weight"))


def require_plain(checkpoint: Checkpoint) -> None:
    """Refuse (OptimError 2) a model that is already quantized, naming its scheme."""
    scheme = checkpoint.quantization
    if scheme is None:
        return
    method = scheme.get("quant_method", "unknown")
    parts = [str(method), str(scheme["format"]) if "format" in scheme else ""]
    bits = scheme.get("bits", scheme.get("w_bit"))
    parts.append(f"{bits} bits" if bits else "")
    raise OptimError(
        f"{checkpoint.source} is already quantized ({', '.join(part for part in parts if part)})",
        "start from the original 16-bit model",
        USAGE,
    )
