#!/usr/bin/env python3
"""Writes tokenizer/unicode_tables.h: which code points are letters, numbers and white space.

    pip install unicodedata2==16.0.0      # or run Python 3.14, whose unicodedata is 16.0
    python3 tokenizer/make_unicode_tables.py > tokenizer/unicode_tables.h

The version matters: a letter that is missing from the table is cut from its word. tiktoken 0.14 and
tokenizers 0.23, with which tokenizer/check_tokenizer.py compares every code point, both use Unicode 16.0.
Other versions have fewer or more code points: Python 3.11 (Unicode 14.0) lacks 9,272 letters and 120 numbers
of 16.0; the regex module of 2026 (18.0), which OpenAI's encoder.py uses, has 17,144 more letters and 336 more
numbers. All versions agree on the code points that they share.
"""
import sys

VERSION = "16.0.0"

try:
    import unicodedata2 as unicodedata
except ImportError:
    import unicodedata
if unicodedata.unidata_version != VERSION:
    sys.exit(f"make_unicode_tables.py: this Python has Unicode {unicodedata.unidata_version}, "
             f"wanted {VERSION}: pip install unicodedata2=={VERSION}")


def is_white_space(c):
    # The property White_Space: the separators, and six control characters.
    return unicodedata.category(chr(c)).startswith("Z") or 0x09 <= c <= 0x0D or c == 0x85


def ranges(belongs):
    """The [first, last] ranges of the code points for which belongs() is true."""
    found = []
    for c in range(0x110000):
        if not belongs(c):
            continue
        if found and found[-1][1] == c - 1:
            found[-1][1] = c
        else:
            found.append([c, c])
    return found


def table(name, comment, belongs):
    print(f"\n// {comment}\nconstexpr Range {name}[] = {{")
    line = "   "
    for first, last in ranges(belongs):
        item = f" {{0x{first:X}, 0x{last:X}}},"
        if len(line) + len(item) > 130:
            print(line)
            line = "   "
        line += item
    print(line + "\n};")


print(f"""\
// unicode_tables.h - which code points are letters, numbers and white space, in Unicode {VERSION}.
// Made by make_unicode_tables.py, which says why this version; do not edit.
#pragma once

#include <cstdint>

namespace unicode {{

struct Range {{
    uint32_t first, last;
}};""")
table("LETTERS", "\\p{L}: categories Lu, Ll, Lt, Lm, Lo",
      lambda c: unicodedata.category(chr(c)).startswith("L"))
table("NUMBERS", "\\p{N}: categories Nd, Nl, No", lambda c: unicodedata.category(chr(c)).startswith("N"))
table("WHITE_SPACE", "\\s: the property White_Space", is_white_space)
print("\n}  // namespace unicode")
