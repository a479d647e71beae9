"""The printable stand-ins for bytes in which byte-level vocabularies are written."""

from __future__ import annotations


def byte_of_character() -> dict[str, int]:
    """Byte that each of the 256 stand-in characters means, in GPT-2's order.

    Printable Latin-1 characters mean themselves; the other bytes take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    stand_ins = {chr(byte): byte for byte in printable}
    stand_ins.update({chr(0x100 + number): byte for number, byte in enumerate(others)})
    return stand_ins
