"""Dense little-endian bit packing, as compressed-tensors >= 0.19 stores it.

Row after row, value i takes the bits [i*b, (i+1)*b) of a stream that is cut into int32 words; a
value may straddle two words (b = 3) and the last word is padded with zeros. Eight values take
exactly b bytes, so both directions work on columns of bytes and make nothing much wider.
"""

import torch
from torch import Tensor


def words(count: int, bits: int) -> int:
    """How many int32 words `count` values of `bits` bits take."""
    return -(-count * bits // 32)


def pack_rows(values: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] with values below 2**bits -> int32 [rows, ceil(n*bits/32)]."""
    rows, count = values.shape
    padded = values if count % 8 == 0 else torch.nn.functional.pad(values, (0, -count % 8))
    if 8 % bits == 0:
        return _joined(padded, bits, words(count, bits))
    octets = padded.reshape(rows, -1, 8)
    width = max(octets.shape[1] * bits, words(count, bits) * 4)
    stream = torch.zeros(rows, width, dtype=torch.uint8, device=values.device)
    grouped = stream[:, : octets.shape[1] * bits].view(rows, -1, bits)
    for value, byte, shift in _pieces(bits):
        piece = octets[:, :, value]
        grouped[:, :, byte] |= piece << shift if shift >= 0 else piece >> -shift
    kept = stream[:, : words(count, bits) * 4].reshape(-1)
    return kept.view(torch.int32).view(rows, words(count, bits))


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """int32 [rows, ceil(count*bits/32)] -> uint8 [rows, count]; the inverse of `pack_rows`."""
    rows, octets = packed.shape[0], -(-count // 8)
    stream = packed.reshape(-1).contiguous().view(torch.uint8).view(rows, -1)  # of one row, too
    if 8 % bits == 0:
        return _spread(stream, bits)[:, :count].contiguous()
    if stream.shape[1] < octets * bits:
        stream = torch.nn.functional.pad(stream, (0, octets * bits - stream.shape[1]))
    grouped = stream[:, : octets * bits].view(rows, octets, bits)
    values = torch.zeros(rows, octets, 8, dtype=torch.uint8, device=packed.device)
    for value, byte, shift in _pieces(bits):
        piece = grouped[:, :, byte]
        values[:, :, value] |= piece >> shift if shift >= 0 else piece << -shift
    values &= (1 << bits) - 1
    return values.view(rows, -1)[:, :count].contiguous()


def _spread(stream: Tensor, bits: int) -> Tensor:
    """uint8 [rows, n] -> uint8 [rows, n * 8/bits]: each field of a byte becomes a byte.

    A byte is widened to as many bytes as it has fields; shifts by 8 - bits put each in its place.
    """
    fields = 8 // bits
    byte = stream.to({1: torch.uint8, 2: torch.int16, 4: torch.int32}[fields])
    mask = ((1 << bits) - 1) * sum(256**i for i in range(fields))
    wide = byte.clone()
    for i in range(1, fields):
        wide |= byte << i * (8 - bits)
    wide &= mask
    return wide.view(torch.uint8)


def _joined(values: Tensor, bits: int, count: int) -> Tensor:
    """uint8 [rows, n] -> int32 [rows, count]: the inverse of `_spread`; n a multiple of 8.

    Neighbours become one byte of twice the bits, until a byte is full.
    """
    joined = values.reshape(-1)
    while bits < 8:
        pairs = joined.view(torch.int16)
        joined, bits = (pairs | pairs >> (8 - bits)).to(torch.uint8), 2 * bits
    stream = joined.view(values.shape[0], -1)
    return torch.nn.functional.pad(stream, (0, 4 * count - stream.shape[1])).view(torch.int32)


def _pieces(bits: int) -> list[tuple[int, int, int]]:
    """(value, byte, left shift of the value in the byte) for the 8 values of `bits` bytes."""
    return [
        (value, byte, value * bits - 8 * byte)
        for value in range(8)
        for byte in range(value * bits // 8, (value * bits + bits - 1) // 8 + 1)
    ]
