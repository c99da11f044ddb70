#!/usr/bin/env python3
"""Writes tokenizer/unicode_tables.h: which code points are letters, numbers, marks and white space, and which
are Arabic letters in another form.

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


# Letters that are one of U+0621 to U+064A in the style of another language or region. Unicode's
# decompositions do not relate these. Letters of another sound, such as peh and gaf, are not among them.
SAME_LETTER = {
    "KEHEH": "KAF", "SWASH KAF": "KAF", "FARSI YEH": "YEH", "YEH BARREE": "YEH", "KASHMIRI YEH": "YEH",
    "YEH WITH TAIL": "YEH", "E": "YEH", "ALEF WASLA": "ALEF",
    "ALEF WITH WAVY HAMZA ABOVE": "ALEF WITH HAMZA ABOVE",
    "ALEF WITH WAVY HAMZA BELOW": "ALEF WITH HAMZA BELOW", "HIGH HAMZA": "HAMZA", "HEH GOAL": "HEH",
    "HEH DOACHASHMEE": "HEH", "AE": "HEH", "TEH MARBUTA GOAL": "TEH MARBUTA", "NOON GHUNNA": "NOON",
    "FEH WITH DOT MOVED BELOW": "FEH", "DOTLESS FEH": "FEH",
    "QAF WITH DOT ABOVE": "QAF", "DOTLESS QAF": "QAF",
}
# The blocks of is_arabic_letter() in data/clean.h. It has one more, U+10EC0 to U+10EFF, whose letters are not
# made of U+0621 to U+064A; its four marks are not in MARKS.
ARABIC_BLOCKS = [(0x600, 0x6FF), (0x750, 0x77F), (0x870, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF),
                 (0x1EE00, 0x1EEFF)]
FIRST, LAST, TATWEEL = 0x621, 0x64A, 0x640


def letters_of(c):
    """The letters U+0621 to U+064A, and spaces, that the Arabic letter c stands for; "" if none."""
    found = ""
    for d in unicodedata.normalize("NFKD", chr(c)):
        name = unicodedata.name(d, "").removeprefix("ARABIC LETTER ")
        same = SAME_LETTER.get(name, "ALEF" if name.startswith("ALEF WITH ATTACHED ") else "")
        if same:
            d = unicodedata.lookup("ARABIC LETTER " + same)
        found += d
    # Compose alef with madda and the like; what still is a mark is a vowel sign.
    found = "".join(d for d in unicodedata.normalize("NFC", found) if unicodedata.category(d)[0] != "M")
    known = all(FIRST <= ord(d) <= LAST or d == " " for d in found)
    return found if known and found.strip(" " + chr(TATWEEL)) else ""


def arabic_forms():
    """(c, its letters) for each Arabic letter or ligature outside U+0621 to U+064A that is made of those."""
    for first, last in ARABIC_BLOCKS:
        for c in range(first, last + 1):
            if not FIRST <= c <= LAST and unicodedata.category(chr(c)) in ("Lo", "Lm") and letters_of(c):
                yield c, letters_of(c)


def is_mark(c):
    """Vowel signs and other combining marks, also where they stand on a space or a tatweel or are written
    small between letters; and characters that only control how others are shown."""
    category, d = unicodedata.category(chr(c)), unicodedata.normalize("NFKD", chr(c))
    if category == "Cf" or 0x300 <= c <= 0x36F:
        return True
    if not any(first <= c <= last for first, last in ARABIC_BLOCKS):
        return False
    return (category in ("Mn", "Mc", "Me") or unicodedata.name(chr(c), "").startswith("ARABIC SMALL ")
            or (category == "Lo" and len(d) > 1 and d[0] in " " + chr(TATWEEL)
                and all(unicodedata.category(x)[0] == "M" for x in d[1:])))


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


def print_items(items):
    """The items of an array and its end, in lines of at most 110 columns."""
    line = "   "
    for item in items:
        if len(line) + 1 + len(item) > 110:
            print(line)
            line = "   "
        line += " " + item
    print(line + "\n};")


def table(name, comment, belongs):
    print(f"\n// {comment}\nconstexpr Range {name}[] = {{")
    print_items(f"{{0x{first:X}, 0x{last:X}}}," for first, last in ranges(belongs))


print(f"""\
// unicode_tables.h - which code points are letters, numbers, marks and white space, and which are Arabic
// letters in another form, in Unicode {VERSION}.
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
table("MARKS", "Arabic vowel signs and marks, combining accents, and format controls", is_mark)

print("""
// An Arabic letter or ligature outside U+0621 to U+064A, and the letters in that range that it is made of.
struct Form {
    uint32_t from;
    const char* to;  // UTF-8
};
constexpr Form ARABIC_FORMS[] = {""")
print_items(f'{{0x{c:X}, "{to}"}},' for c, to in arabic_forms())
print("\n}  // namespace unicode")
